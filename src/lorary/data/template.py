"""Prompt templates: how a row becomes token ids, and which of them are learnt.

The ids of the prompt are always exactly those that generation feeds, so training and use never disagree about the
border between prompt and target. Masking goes by position, never by id: in many bases padding and EOS share one id.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.data.chat import chat_frame, render_chat, warn_of_dates
from lorary.data.conversation import Conversation
from lorary.data.schema import shorten
from lorary.errors import TaskError, UsageError

# A tokenizer is transformers' PreTrainedTokenizerBase; Any, because importing transformers takes seconds.
Tokenizer = Any
Ids = tuple[int, ...]

ANCHOR = "\n"
_CONVERSATION = (
    "conversations are written as plain text, although the base model has a chat template for them: "
    "--template chat uses it"
)


@dataclass(frozen=True)
class Example:
    """A row as token ids.

    Args:
        prompt_ids: what generation would feed, cut from the left where it was too long.
        target_ids: what is learnt: the target and EOS, never cut.
        truncated: number of prompt tokens that were cut.
    """

    prompt_ids: Ids
    target_ids: Ids
    truncated: int


@dataclass(frozen=True)
class Template:
    """Turns sources and targets into ids; made by `make_template`.

    Args:
        name: "plain" or "chat", for provenance.
        tokenizer: the base model's transformers tokenizer.
        max_length: most tokens of prompt and target together.
        render: makes the prompt's text out of a source, or of a conversation.
        gap: stands between prompt and target.
        leading: special ids before the prompt's text (BOS).
        head: the ids with which every prompt begins, `leading` included; they are never cut.
        prefix: the text with which every prompt begins, as a chat template writes it now; "" for plain.
    """

    name: str
    tokenizer: Tokenizer = field(repr=False)
    max_length: int
    render: Callable[[str | Conversation], str] = field(repr=False)
    gap: str
    leading: Ids
    head: Ids
    prefix: str = ""

    def encode_prompt(self, source: str | Conversation, most: int | None = None) -> Ids:
        """The ids that generation feeds, without an EOS, cut from the left to `max_length`, or to fewer.

        Args:
            source: `prompt` of a row, or a text.
            most: how many there may be where that is fewer than `max_length`.
        """
        length = self.max_length if most is None else min(most, self.max_length)
        return self._keep_right(self._tokenise(self.render(source)), length)

    def encode(self, source: str | Conversation, target: str) -> Example:
        """Prompt and target of one row.

        The text of both is tokenised at once and cut where the prompt's own ids end. Where the border has melted into
        a piece that is not the prompt's, the target is tokenised by itself: generation could not produce that piece.

        Args:
            source: `prompt` of a row, or a text.
            target: the row's target, or any other answer to be scored.

        Returns:
            Ids of the prompt, and of the target with EOS.

        Raises:
            TaskError: if the target alone is too long.
        """
        text, answer = self.render(source), self.gap + target
        prompt, whole = self._tokenise(text), self._tokenise(text + answer)
        is_prefix = whole[: len(prompt)] == prompt
        pieces = whole[len(prompt) :] if is_prefix else _continuation(self.tokenizer, answer)
        target_ids = (*pieces, int(self.tokenizer.eos_token_id))
        prompt_ids = self._keep_right(prompt, self.max_length - len(target_ids))
        if not prompt_ids:
            raise TaskError(
                f"a target must leave room for a prompt within max_length {self.max_length}",
                found=f"{len(target_ids)} tokens with EOS: {shorten(target)}",
                remedy="raise max_length, or remove the row",
            )
        return Example(prompt_ids=prompt_ids, target_ids=target_ids, truncated=len(prompt) - len(prompt_ids))

    def _tokenise(self, text: str) -> Ids:
        return self.leading + _pieces(self.tokenizer, text)

    def _keep_right(self, ids: Ids, length: int) -> Ids:
        """The last `length` ids, with the head kept in their stead on the left; () where not even the head fits."""
        if len(ids) <= length:
            return ids
        num_head = num_common(ids, self.head)
        num_tail = length - num_head
        return ids[:num_head] + ids[len(ids) - num_tail :] if num_tail > 0 else ()


def make_template(name: str, tokenizer: Tokenizer, *, max_length: int = 1024) -> Template:
    """Make the template of a name for a tokenizer.

    Args:
        name: "plain" (source, one space, target, EOS) or "chat" (the source as a user's message in the base's own chat
            template, the target as the reply, EOS).
        tokenizer: the base model's transformers tokenizer.
        max_length: most tokens of prompt and target together.

    Raises:
        UsageError: if the name is unknown, `max_length` leaves no room, or the tokenizer lacks EOS or a chat template.
    """
    if name not in TEMPLATES:
        raise UsageError("a template must be plain or chat", found=shorten(name))
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer must have an EOS token: without one an answer never ends",
            found=type(tokenizer).__name__,
            remedy="set tokenizer.eos_token",
        )
    template = TEMPLATES[name](tokenizer, max_length)
    shortest = len(template.head) + 2
    if max_length < shortest:
        raise UsageError(
            f"max_length must be at least {shortest} here: what stands before every prompt, one token of it, and EOS",
            found=max_length,
        )
    return template


def _plain(tokenizer: Tokenizer, max_length: int) -> Template:
    leading = _leading_specials(tokenizer)

    def render(source: str | Conversation) -> str:
        is_talk = isinstance(source, Conversation) and not source.is_question
        if is_talk and getattr(tokenizer, "chat_template", None):
            warnings.warn(_CONVERSATION, stacklevel=2)
        return str(source)

    return Template("plain", tokenizer, max_length, render=render, gap=" ", leading=leading, head=leading)


def _chat(tokenizer: Tokenizer, max_length: int) -> Template:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the template chat needs a base model whose tokenizer has a chat template",
            found=f"{type(tokenizer).__name__} without one",
            remedy="use --template plain",
        )

    frame = chat_frame(tokenizer)
    warn_of_dates(frame)

    def render(source: str | Conversation) -> str:
        return render_chat(tokenizer, source)

    # What stands before every message is in the text, BOS included, where there is one.
    head = _pieces(tokenizer, frame.prefix)
    return Template("chat", tokenizer, max_length, render, gap="", leading=(), head=head, prefix=frame.prefix)


TEMPLATES: dict[str, Callable[[Tokenizer, int], Template]] = {"plain": _plain, "chat": _chat}


def warn_of_cuts(task: str, examples: Sequence[Example]) -> None:
    """Say how many prompts of a task lost their start."""
    cut = sum(example.truncated > 0 for example in examples)
    if cut:
        message = f"task '{task}': the prompts of {cut} of {len(examples)} rows were too long and lost their start"
        warnings.warn(message, stacklevel=2)


def _pieces(tokenizer: Tokenizer, text: str) -> Ids:
    """Ids of a text without special tokens of the tokenizer's own; `verbose` off, since we cut long texts ourselves."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _leading_specials(tokenizer: Tokenizer) -> Ids:
    """The ids that the tokenizer puts before a text (BOS); those after it (EOS) would end a prompt too soon."""
    probe = _pieces(tokenizer, "a")
    full = tuple(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(probe) + 1):
        if full[start : start + len(probe)] == probe:
            return full[:start]
    raise UsageError(
        "the tokenizer must only add special tokens around a text, not change its pieces",
        found=f"{type(tokenizer).__name__}: {probe} became {full}",
    )


def _continuation(tokenizer: Tokenizer, text: str) -> Ids:
    """Ids of a text that continues another one.

    Behind an anchor, so that tokenizers which put a space before every text (sentencepiece) do not put one here.
    """
    anchor, anchored = _pieces(tokenizer, ANCHOR), _pieces(tokenizer, ANCHOR + text)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else _pieces(tokenizer, text)


def num_common(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences share from the left on.

    Args:
        first: token ids, or anything that can be compared.
        second: likewise.
    """
    pairs = zip(first, second, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
