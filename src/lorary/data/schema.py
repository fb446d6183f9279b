"""Rows and tasks as plain data, and the one validator that every source of rows goes through."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lorary.data.conversation import Conversation, Turns
from lorary.errors import TaskError, UsageError

SPLITS = ("train", "val", "test")
REQUIRED_FIELDS = ("task", "split", "source", "target")
FIELDS = frozenset((*REQUIRED_FIELDS, "family", "targets", "options", "extra"))
NO_FAMILY = "none"
# Objects and lists within each other, in `extra`.
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One example of a task.

    Args:
        task: name of the task the row belongs to.
        split: "train", "val" or "test".
        source: the prompt, without the space that the template puts after it.
        target: the answer to learn.
        family: group of related tasks, None where the row does not say.
        targets: all references that count as right; empty where `target` is the only one.
        options: continuations to rank for multiple choice; empty for free answers.
        extra: anything else, JSON values only; carried along and never interpreted.
        turns: role and text of each turn before the answer, where the row is a conversation; `source` is its text.
    """

    task: str
    split: str
    source: str
    target: str
    family: str | None = None
    targets: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    turns: Turns = ()

    @property
    def prompt(self) -> str | Conversation:
        """What a template is given."""
        return Conversation(self.turns) if self.turns else self.source

    @property
    def references(self) -> tuple[str, ...]:
        """All answers that count as right."""
        return self.targets or (self.target,)

    def canonical_json(self) -> str:
        """The row as JSON with sorted keys and without empty fields: equal rows give equal text."""
        values = {name: getattr(self, name) for name in (*FIELDS, "turns")}
        filled = {name: value for name, value in values.items() if value}
        return json.dumps(filled, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Task:
    """Named examples with a split and a metric.

    Args:
        name: label of the task.
        family: group of related tasks, "none" where nobody said.
        role: "train" for tasks that experts may be trained on, "heldout" for those that never are.
        metric: "acc" (rank the options), "em" (exact match), "rougeL", or another name the evaluation knows.
        rows: the rows of every split in the order of their file; splits without rows are empty.
    """

    name: str
    family: str
    role: str
    metric: str
    rows: Mapping[str, tuple[Row, ...]] = field(repr=False)

    def split(self, name: str) -> tuple[Row, ...]:
        """The rows of one split, in order.

        Raises:
            UsageError: if there is no such split.
        """
        if name not in SPLITS:
            raise UsageError("a split is one of train, val, test", found=shorten(name))
        return self.rows.get(name, ())

    @cached_property
    def data_hash(self) -> str:
        """sha256 over the canonical JSON of the rows in order: says what an expert was trained on."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for row in self.split(split):
                digest.update(row.canonical_json().encode())
                digest.update(b"\n")
        return digest.hexdigest()


def make_task(
    name: str,
    rows: Sequence[Row],
    where: str,
    *,
    family: str | None = None,
    role: str | None = None,
    metric: str | None = None,
) -> Task:
    """Gather the rows of one task and fill in what nobody said.

    Args:
        name: label of the task; every row carries it.
        rows: all rows of the task, any order of splits.
        where: the file or data set the rows come from, for errors.
        family: the family that a manifest gives; by default the rows', or "none".
        role: by default "train" where there are train rows, else "heldout".
        metric: by default "acc" where every row has options, else "em".

    Raises:
        TaskError: if there are no rows, or families disagree.
    """
    if not rows:
        raise TaskError(
            f"{where}: task '{name}' must have rows", found="none", remedy="add rows, or leave the task out"
        )
    families = sorted({row.family for row in rows if row.family is not None} | ({family} if family else set()))
    if len(families) > 1:
        raise TaskError(
            f"{where}: all rows of task '{name}' and its manifest must name one family",
            found=", ".join(families),
            remedy="correct the field 'family', or give the rows different task names",
        )
    has_options = all(row.options for row in rows)
    by_split = {split: tuple(row for row in rows if row.split == split) for split in SPLITS}
    return Task(
        name=name,
        family=families[0] if families else NO_FAMILY,
        role=role or ("train" if by_split["train"] else "heldout"),
        metric=metric or ("acc" if has_options else "em"),
        rows=by_split,
    )


def parse_row(record: object, where: str) -> Row:
    """Check one record against the row format and freeze it.

    Args:
        record: what a line of JSON or a row of a data set holds.
        where: place of the record, for errors (`tasks.jsonl:17`).

    Raises:
        TaskError: naming the place, the field, the value found and the remedy.
    """
    if not isinstance(record, dict):
        raise TaskError(
            f"{where}: a row must be a JSON object",
            found=shorten(record),
            remedy='write one {"task": ..., "split": ..., "source": ..., "target": ...} a line',
        )
    if unknown := record.keys() - FIELDS:
        raise TaskError(
            f"{where}: a row may only have the fields {', '.join(sorted(FIELDS))}",
            found=", ".join(sorted(shorten(key) for key in unknown)),
            remedy="put other values under 'extra'",
        )
    task, split, source, target = (_text(record.get(name), name, where) for name in REQUIRED_FIELDS)
    if split not in SPLITS:
        raise _field_error(where, "split", "be train, val or test", split, "correct the split")
    family = record.get("family")
    return Row(
        task=task,
        split=split,
        source=source,
        target=target,
        family=None if family is None else _text(family, "family", where),
        targets=_choices(record.get("targets"), "targets", target, where),
        options=_choices(record.get("options"), "options", target, where),
        extra=_extra(record.get("extra"), where),
    )


def shorten(value: object, limit: int = 80) -> str:
    """A value as it may stand in an error: its repr, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _field_error(where: str, name: str, rule: str, value: object, remedy: str) -> TaskError:
    return TaskError(f"{where}: field '{name}' must {rule}", found=shorten(value), remedy=remedy)


def _text(value: object, name: str, where: str) -> str:
    if value is None:
        raise TaskError(f"{where}: field '{name}' is missing", remedy=f'add "{name}" to the row')
    if not isinstance(value, str) or not value.strip():
        raise _field_error(where, name, "be a non-empty text", value, "correct the value, or remove the row")
    if not value.isascii():
        # JSON can spell half a surrogate pair (\ud800), which no tokenizer can encode.
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _field_error(where, name, "be valid Unicode", value, "replace the lone surrogate") from None
    return value


def _choices(value: object, name: str, target: str, where: str) -> tuple[str, ...]:
    """The list field `name`: distinct texts with the target among them; absent, null and [] mean none."""
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise _field_error(where, name, "be a list of texts", value, "write a JSON list")
    choices = tuple(_text(item, name, where) for item in value)
    if target not in choices:
        finding = f"target {shorten(target)}, {name} {shorten(value)}"
        raise TaskError(
            f"{where}: field '{name}' must contain the target",
            found=finding,
            remedy="spell the target exactly as it stands there, or add it",
        )
    if len(set(choices)) != len(choices):
        raise _field_error(where, name, "not repeat a text", value, "remove the repetition")
    if name == "options" and len(choices) < 2:
        raise _field_error(where, name, "hold at least two texts", value, "add the other options, or drop the field")
    return choices


def _check_depth(value: object, depth: int = 0) -> None:
    """Refuse what could be read, and would be too deep where it is written, hashed or compared."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, depth + 1)


def _shown(value: object) -> str:
    try:
        return shorten(value)
    except RecursionError:
        return "an object"


def _extra(value: object, where: str) -> Mapping[str, Any]:
    if not value and (value is None or value == {}):
        return {}
    if not isinstance(value, dict):
        raise _field_error(where, "extra", "be a JSON object", value, 'write {"key": value}')
    try:
        _check_depth(value)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError over half a character is a ValueError
        raise TaskError(
            f"{where}: field 'extra' may only hold JSON values",
            found=f"{_shown(value)} ({error})",
            remedy="turn the value into texts, numbers, lists or objects, or remove it",
        ) from None
    return value
