"""Prompts that somebody asks about, out of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorary.data.jsonl import UTF8_BOM, iter_records
from lorary.data.schema import FIELDS, shorten
from lorary.errors import TaskError, UsageError
from lorary.evaluate.completion import check_text
from lorary.reading import read_regular

# By what a prompt and its answer may be called.
PROMPTS, ANSWERS = ("prompt", "source"), ("answer", "target", "completion")


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        text: the prompt.
        answer: the answer to compare with, or whose likelihood is looked at; None without one.
    """

    text: str
    answer: str | None = None


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse what cannot be answered.

    Raises:
        UsageError: if there is no prompt, or a text is empty.
    """
    if not prompts:
        raise UsageError("there must be a prompt", found="none", remedy="--prompt TEXT or --prompts FILE")
    for prompt in prompts:
        check_text(prompt.text, "--prompt")
        if prompt.answer is not None:
            check_text(prompt.answer, "--answer")


def read_prompts(path: str) -> list[Prompt]:
    """Prompts out of a file: lines of text, or JSON objects with `prompt` (or `source`) and perhaps an `answer`.

    A file that ends in .jsonl, or begins with `{`, holds objects; rows of a task are such. Blank lines are passed over.

    Raises:
        UsageError: if there is no such file, or a text is empty.
        TaskError: if a line is something else, or there is none; names file:line.
    """
    try:
        data = read_regular(Path(path)).removeprefix(UTF8_BOM)
    except FileNotFoundError:
        raise UsageError("the prompts file must exist", found=path, remedy="check the path") from None
    except OSError as error:
        raise TaskError(f"{path}: the prompts file must be readable", found=error.strerror or str(error)) from error
    if Path(path).suffix.lower() == ".jsonl" or data.lstrip().startswith(b"{"):
        prompts = [_prompt(record, where) for where, record in iter_records(path, "prompts")]
    else:
        prompts = _lines(data, path)
    if not prompts:
        raise TaskError(f"{path}: the prompts file must hold a prompt", found="none")
    return prompts


def _lines(data: bytes, path: str) -> list[Prompt]:
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: the text must be UTF-8", found=f"byte 0x{error.object[error.start]:02x}",
                        remedy="save the file as UTF-8") from None  # fmt: skip
    return [Prompt(line.removesuffix("\r")) for line in lines if line.strip()]


def _prompt(record: object, where: str) -> Prompt:
    names = set(record) if isinstance(record, dict) else set()
    asked, answered = names & {*PROMPTS}, names & {*ANSWERS}
    others = names - asked - answered - (FIELDS if "source" in names else set())
    if not isinstance(record, dict) or len(asked) != 1 or len(answered) > 1 or others:
        raise TaskError(
            f"{where}: a line must be an object with {' or '.join(map(repr, PROMPTS))}, perhaps one of "
            f"{', '.join(map(repr, ANSWERS))}, and nothing else but the fields of a row",
            found=shorten(record),
            remedy='{"prompt": "...", "answer": "..."}',
        )
    texts = {key: record[key] for key in (*asked, *answered)}
    if wrong := {key: value for key, value in texts.items() if not isinstance(value, str)}:
        raise TaskError(f"{where}: prompt and answer must be strings", found=shorten(wrong))
    for key, value in texts.items():
        check_text(value, f"{where}: '{key}'")
    return Prompt(record[asked.pop()], record[answered.pop()] if answered else None)
