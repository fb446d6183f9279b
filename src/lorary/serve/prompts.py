"""Prompts of requests as token ids of the base."""

import sys
from functools import cache
from typing import Any

from lorary.data.conversation import Conversation
from lorary.data.template import Ids, Template, make_template
from lorary.errors import LibraryError
from lorary.library.opening import template_of
from lorary.library.store import Library
from lorary.route.setting import CHAT
from lorary.serve.api_error import ApiError
from lorary.serve.text import TokenTexts

PLAIN = "plain"


class Prompts:
    """Turns texts, conversations and token ids into prompts that fit the base.

    Args:
        library: whose experts say how prompts are written.
        tokenizer: of the base.
        context: positions of the base; None where it has no bound.
        num_tokens: token ids that the base knows.
        most: tokens that a prompt may have; None where only the context bounds it.
    """

    def __init__(
        self, library: Library, tokenizer: Any, *, context: int | None, num_tokens: int, most: int | None
    ) -> None:
        self._library, self.tokenizer, self.context = library, tokenizer, context
        self._num_tokens, self._most = num_tokens, most
        self.texts = TokenTexts(tokenizer)
        self._template = cache(self._make_template)
        self.experts_template = PLAIN
        self.look_at_experts()

    def look_at_experts(self) -> None:
        """Find out how the experts' prompts are written; those of unlike ones as plain text."""
        try:
            self.experts_template = template_of(self._library, None)
        except LibraryError:
            self.experts_template = PLAIN

    @property
    def has_chat(self) -> bool:
        """Whether the base has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def chat_template(self, conversation: Conversation, *, is_base: bool) -> str:
        """How a conversation is written where the request does not say.

        A question alone is written as the experts know it; a longer conversation, and what the base answers by itself,
        in the base's chat template where it has one.

        Args:
            conversation: so far.
            is_base: whether no expert answers.
        """
        if conversation.is_question and not is_base:
            return self.experts_template
        return CHAT if self.has_chat else PLAIN

    def encode(self, source: str | Conversation, template: str) -> Ids:
        """The ids of a text or a conversation.

        Raises:
            UsageError: if the base has no such template, or it does not take the conversation.
            ApiError: if the text is empty.
        """
        if not str(source).strip():
            raise ApiError(400, "a prompt must hold text", found="none", param="prompt")
        # As text, since the request asks for that: a conversation would warn that the base has a template for it.
        return self._template(template).encode_prompt(str(source) if template == PLAIN else source)

    def check(self, ids: Ids, max_new_tokens: int) -> None:
        """Refuse ids that the base does not know, and prompts that do not fit.

        Raises:
            ApiError: with the numbers of tokens.
        """
        if not ids:
            raise ApiError(400, "a prompt must hold a token", found="none", param="prompt")
        if (highest := max(ids)) >= self._num_tokens:
            raise ApiError(400, f"token ids must be below {self._num_tokens}", found=highest, param="prompt")
        if self._most is not None and len(ids) > self._most:
            rule = f"a prompt may have {self._most} tokens here"
            raise ApiError(400, rule, found=len(ids), param="prompt", code="context_length_exceeded")
        if self.context is not None and len(ids) + max_new_tokens > self.context:
            raise ApiError(
                400,
                f"prompt and answer must fit the {self.context} positions of the base model",
                found=f"{len(ids)} tokens of prompt and {max_new_tokens} of answer",
                remedy="shorten the prompt, or lower max_tokens",
                param="prompt",
                code="context_length_exceeded",
            )

    def room(self, ids: Ids, most: int) -> int:
        """Tokens that an answer may have where the request does not say."""
        return most if self.context is None else max(1, min(most, self.context - len(ids)))

    def _make_template(self, name: str) -> Template:
        return make_template(name, self.tokenizer, max_length=sys.maxsize)
