"""Prompts in a base's own chat template, which is a program: it may print the date, or something else each time."""

import warnings
from dataclasses import dataclass
from typing import Any

from lorary.data.conversation import USER, Conversation
from lorary.errors import UsageError

# Before a template, it lets that print no date but this word.
_NO_DATE = "{% macro strftime_now(format) %}the-date{% endmacro %}"


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template puts around a user's message now.

    Args:
        prompt: a message of one character as it is fed, frame and all.
        prefix: the text before every message.
        is_lasting: whether it will be the same tomorrow, as far as can be seen.
    """

    prompt: str
    prefix: str
    is_lasting: bool


def render_chat(tokenizer: Any, message: str | Conversation, chat_template: str | None = None) -> str:
    """A user's message alone, or a conversation, in the base's chat template, up to where the answer begins.

    Args:
        tokenizer: with a chat template.
        message: of the user, or all turns so far.
        chat_template: in place of the tokenizer's own.

    Raises:
        UsageError: if the template takes no such message, or not these roles in this order.
    """
    conversation = message if isinstance(message, Conversation) else Conversation(((USER, message),))
    messages = conversation.messages()
    override = {} if chat_template is None else {"chat_template": chat_template}
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **override))
    except Exception as error:  # whatever a template raises: it is a program of its own
        raise UsageError(
            f"the base model's chat template must take {_shown(conversation)}",
            found=f"{type(error).__name__}: {error}",
            remedy="use --template plain",
        ) from error


def _shown(conversation: Conversation) -> str:
    roles = ", ".join(role for role, _ in conversation.turns)
    return "a user's message alone" if conversation.is_question else f"turns of {roles}"[:200]


def chat_frame(tokenizer: Any) -> ChatFrame:
    """What the chat template of a tokenizer puts around a message now.

    Raises:
        UsageError: as for `render_chat`.
    """
    first, second = render_chat(tokenizer, "0"), render_chat(tokenizer, "1")
    common = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    is_lasting = _undated(tokenizer) in (None, first) and all(render_chat(tokenizer, "0") == first for _ in range(2))
    return ChatFrame(first, first[:common], is_lasting)


def _undated(tokenizer: Any) -> str | None:
    """The same message with a word in the place of each date; None where the template asks for no date."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return None
    return render_chat(tokenizer, "0", chat_template=_NO_DATE + tokenizer.get_chat_template())


def warn_of_dates(frame: ChatFrame) -> None:
    """Say that prompts of another day, or of the next run, will be others."""
    if not frame.is_lasting:
        shown = frame.prefix if len(frame.prefix) <= 200 else f"{frame.prefix[:197]}..."
        message = (
            f"the base's chat template prints the date, or something else that changes: prompts begin {shown!r} now"
        )
        warnings.warn(f"{message}, and differently later", stacklevel=3)
