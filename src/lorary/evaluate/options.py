"""What is scored of a row with options: each option after the prompt, or one text after several prompts."""

from typing import Any

from lorary.data.conversation import Conversation
from lorary.data.schema import Row, shorten
from lorary.errors import TaskError

FIELDS = ("contexts", "continuation")


def scored_pairs(row: Row) -> list[tuple[str | Conversation, str]]:
    """Prompt and answer whose likelihood ranks each option of a row.

    Where `extra` gives `contexts`, one prompt per option, and `continuation`, the same text is scored after each of
    them: WinoGrande's options stand in the middle of a sentence, and its end tells which one fits. Source: partial
    evaluation of arXiv 1806.02847.

    Raises:
        TaskError: if only one of both is given, or they are not a text per option and a text.
    """
    if not any(field in row.extra for field in FIELDS):
        return [(row.prompt, option) for option in row.options]
    contexts, continuation = (row.extra.get(field) for field in FIELDS)
    texts: list[Any] = [*contexts, continuation] if isinstance(contexts, list) else [contexts]
    if len(texts) != len(row.options) + 1 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TaskError(
            f"'contexts' in extra of task '{row.task}' must be a text per option, and 'continuation' a text beside it",
            found=f"{len(row.options)} options, contexts {shorten(contexts)}, continuation {shorten(continuation)}",
        )
    return [(context, texts[-1]) for context in texts[:-1]]
