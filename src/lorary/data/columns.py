"""Own data as people have it: which columns of a file hold the prompt and the answer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorary.data.conversation import Turns, split_messages
from lorary.data.schema import FIELDS
from lorary.errors import TaskError, UsageError, did_you_mean

MESSAGES, CONTEXT = "messages", "input"
# Columns in which people keep prompt and answer, in the order in which they are looked for. Columns that are called as
# the fields of a row win; of the others a row must have those of one kind.
FORMS: Mapping[str, Mapping[str, str]] = {
    "source, target": {"source": "source", "target": "target"},
    "prompt, completion": {"source": "prompt", "target": "completion"},
    "instruction, input, output": {"source": "instruction", "target": "output"},
    "question, answer": {"source": "question", "target": "answer"},
    "messages": {MESSAGES: MESSAGES},
}
OURS, INSTRUCTION = "source, target", "instruction, input, output"
# Fields that `--columns` may name a column for.
NAMED = ("source", "target", "options", "targets", "task", "split", "family", MESSAGES)
EXAMPLE = "--columns source=COLUMN,target=COLUMN"


@dataclass(frozen=True)
class NamedColumns:
    """The columns that hold the fields of a row. Made by `parse_columns`.

    Args:
        fields: field of a row, or `messages`, and the column that holds it.
    """

    fields: tuple[tuple[str, str], ...]


def parse_columns(text: str) -> NamedColumns:
    """`source=COLUMN,target=COLUMN` with further fields as columns.

    Raises:
        UsageError: if a part is not FIELD=COLUMN, a field does not exist or is given twice, or source and target (or
            messages in their place) are not both there.
    """
    fields: dict[str, str] = {}
    for part in text.split(","):
        field, _, column = (piece.strip() for piece in part.partition("="))
        if not (field and column):
            raise UsageError("--columns must be FIELD=COLUMN, separated by commas", found=repr(part), remedy=EXAMPLE)
        if field not in NAMED:
            remedy = did_you_mean(field, NAMED, remedy=f"one of {', '.join(NAMED)}")
            raise UsageError("--columns must name fields of a row", found=field, remedy=remedy)
        if field in fields:
            raise UsageError("--columns must name a field once", found=f"{field}, twice", remedy=EXAMPLE)
        fields[field] = column
    if (MESSAGES in fields) == bool({"source", "target"} & set(fields)) or len({"source", "target"} & set(fields)) == 1:
        raise UsageError(
            "--columns must name source and target, or messages alone in their place", found=text, remedy=EXAMPLE
        )
    return NamedColumns(tuple(fields.items()))


def known_form(names: Collection[str]) -> str | None:
    """The kind of columns that these are, a key of `FORMS`; None where they are of none, or of several."""
    forms = _forms(names)
    return forms[0] if forms[:1] == [OURS] or len(forms) == 1 else None


def record_of(row: Mapping[str, Any], columns: NamedColumns | None, where: str) -> tuple[dict[str, Any], Turns]:
    """The fields of a row, as `lorary.data.schema.parse_row` takes them, out of columns of any name.

    Columns that are called as a further field of a row (task, split, family, options, targets, extra) give that field.
    Without a column `extra`, all that are left are gathered there.

    Args:
        row: the columns by name.
        columns: which to read; those of a known kind where None.
        where: place of the row, for errors.

    Returns:
        The fields, and the turns of a conversation before its answer.

    Raises:
        TaskError: if columns are missing, no known ones are there or of several kinds, or messages are no conversation.
    """
    by_field: Mapping[str, str] = _by_field(row, columns, where)
    turns: Turns = ()
    record = {field: row[column] for field, column in by_field.items()}
    left = {name: value for name, value in row.items() if name not in by_field.values()}
    if columns is None and by_field == FORMS[INSTRUCTION]:
        record["source"] = _with_context(record["source"], left.pop(CONTEXT, None))
    if MESSAGES in record:
        conversation, record["target"] = split_messages(record.pop(MESSAGES), where)
        record["source"], turns = str(conversation), conversation.turns
    # A column of another meaning may be called `source` beside those that were read.
    record.update({name: left.pop(name) for name in list(left) if name in FIELDS and name not in record})
    if "extra" in record and left:
        raise TaskError(
            f"{where}: beside a column 'extra', columns must be fields of a row",
            found=", ".join(sorted(map(str, left)))[:200],
            remedy="put their values under 'extra', or call that column otherwise",
        )
    return {"extra": left} | record, turns


def naming_columns(error: TaskError, row: Mapping[str, Any], columns: NamedColumns | None) -> TaskError:
    """The error of a row that does not follow the format, with the columns that its fields were read from.

    Args:
        error: of the row.
        row: the columns by name.
        columns: as for `record_of`.
    """
    by_field = _by_field(row, columns, "")
    read = ", ".join(f"{field} from column '{column}'" for field, column in by_field.items() if field != column)
    remedy = "; ".join(filter(None, [error.remedy, read and f"here {read} is read"]))
    return TaskError(error.rule, found=error.found, remedy=remedy or None)


def _forms(names: Collection[str]) -> list[str]:
    return [form for form, fields in FORMS.items() if set(fields.values()) <= set(names)]


def _by_field(row: Mapping[str, Any], columns: NamedColumns | None, where: str) -> Mapping[str, str]:
    there = f"among {', '.join(sorted(map(str, row)))}"[:300]
    if columns is not None:
        by_field = dict(columns.fields)
        if missing := [column for column in by_field.values() if column not in row]:
            raise TaskError(
                f"{where}: the columns of --columns must be there",
                found=f"no {' and no '.join(missing)} {there}",
                remedy=did_you_mean(missing[0], list(row), remedy=EXAMPLE),
            )
        return by_field
    form, forms = known_form(list(row)), _forms(list(row))
    if form is not None:
        return FORMS[form]
    if forms:
        raise TaskError(
            f"{where}: prompt and answer must stand in columns of one kind",
            found="; ".join(forms),
            remedy=f"say which: {EXAMPLE}, or --columns messages=COLUMN",
        )
    missing = [name for name in ("source", "target") if name not in row]
    raise TaskError(
        f"{where}: there must be columns {'; or '.join(FORMS)}",
        found=f"no {' and no '.join(missing)} {there}",
        remedy=f"{EXAMPLE} says which hold prompt and answer",
    )


def _with_context(instruction: object, context: object) -> object:
    """An instruction and what it is about, with a blank line between; what is no text is refused with the row."""
    if context is None or context == "":
        return instruction
    if not isinstance(instruction, str) or not isinstance(context, str):
        return context if isinstance(instruction, str) else instruction
    return f"{instruction}\n\n{context}" if context.strip() else instruction
