"""Conversations: the turns before an answer, as a template is given them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorary.errors import TaskError

ASSISTANT, USER = "assistant", "user"
# Role and text of each.
Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation up to an answer; as text, each begins with its role, except a question alone.

    >>> print(Conversation((("system", "Be brief."), ("user", "2 + 2?"))))
    System: Be brief.
    User: 2 + 2?
    Assistant:

    Args:
        turns: role and text of each turn.
    """

    turns: Turns

    @property
    def is_question(self) -> bool:
        """Whether it is one turn of a user, which is a prompt like any other."""
        return [role for role, _ in self.turns] == [USER]

    def __str__(self) -> str:
        if self.is_question:
            return self.turns[0][1]
        lines = [f"{role.capitalize()}: {text}" for role, text in self.turns]
        return "\n".join([*lines, f"{ASSISTANT.capitalize()}:"])

    def messages(self) -> list[dict[str, str]]:
        """The turns as a chat template takes them."""
        return [{"role": role, "content": text} for role, text in self.turns]


def split_messages(messages: object, where: str) -> tuple[Conversation, str]:
    """The turns before the last one, and the text of the last one, which is the assistant's.

    Args:
        messages: a list of {"role": ..., "content": ...}; other keys must be null.
        where: place of the row, for errors.

    Raises:
        TaskError: if it is another list, or it does not end with the assistant's answer to an earlier turn.
    """
    if not isinstance(messages, list) or not messages:
        raise TaskError(f"{where}: 'messages' must be a list of turns", found=repr(messages)[:80])
    turns = [_turn(message, f"{where}: turn {number} of 'messages'") for number, message in enumerate(messages)]
    if turns[-1][0] != ASSISTANT or len(turns) < 2:
        raise TaskError(
            f"{where}: 'messages' must end with an answer of the role '{ASSISTANT}' to an earlier turn",
            found=", ".join(role for role, _ in turns)[:80],
            remedy="leave out what follows the last answer, or the row",
        )
    return Conversation(tuple(turns[:-1])), turns[-1][1]


def _turn(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise TaskError(f"{where} must be an object with 'role' and 'content'", found=repr(message)[:80])
    filled = {key: value for key, value in message.items() if value is not None}
    role, content = (_text(filled, key, where) for key in ("role", "content"))
    if others := sorted(set(filled) - {"role", "content"}):
        raise TaskError(
            f"{where} must have 'role' and 'content' alone: no template is given anything else",
            found=", ".join(map(str, others))[:80],
            remedy="remove the key, or put its text into 'content'",
        )
    return role, content


def _text(message: Mapping[str, Any], key: str, where: str) -> str:
    value = message.get(key)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(f"{where}: '{key}' must be a non-empty text", found=repr(value)[:80])
    return value
