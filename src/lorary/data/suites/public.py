"""Public data sets, from the Hub or from a local copy, and rows made of them."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lorary.data.dataset_folder import data_files
from lorary.data.schema import Row, Task, make_task, parse_row, shorten
from lorary.data.tables import read_table
from lorary.errors import TaskError

R = TypeVar("R")
# Larger copies go through the cache of `datasets`, which leaves them on the disk.
MAX_IN_MEMORY = 256 * 1024 * 1024


@dataclass(frozen=True)
class Public:
    """A split of a data set on the Hugging Face Hub.

    Args:
        name: its id.
        split: as the data set calls it.
        config: its configuration, None where it has one only.
    """

    name: str
    split: str
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.name}{f':{self.config}' if self.config else ''}, split '{self.split}'"


def read_public(source: Public, columns: Collection[str], copies: Path | None) -> Any:
    """Rows of a public data set as `datasets` gives them. No code that comes with a data set is ever run.

    A copy is laid out as on the Hub: FOLDER/ID/ with files whose names tell their split (`test-00000-of-00001.parquet`,
    `validation.jsonl`), or FOLDER/ID/CONFIG/ with such files, or with the data set's own README.md that names them.

    Args:
        source: which.
        columns: what is needed of it.
        copies: folder of copies; the Hub is asked where None.

    Raises:
        TaskError: if it cannot be loaded, or lacks a column.
    """
    data_set = _from_hub(source) if copies is None else _from_copies(source, copies)
    if missing := sorted(set(columns) - set(data_set.column_names)):
        raise TaskError(
            f"data set {source} must have the columns {', '.join(sorted(columns))}",
            found=f"no {', no '.join(missing)} among {', '.join(data_set.column_names)}",
            remedy="take the copy from the Hub as it is",
        )
    return data_set


def _from_copies(source: Public, copies: Path) -> Any:
    # Slow to import (1-2 s), and most tasks are JSONL or builtin.
    import datasets

    place = copies / source.name
    if source.config is not None and (place / source.config).is_dir():
        place, config = place / source.config, None
    else:
        config = source.config
    if not place.is_dir():
        raise TaskError(
            f"a copy of data set {source} must lie below {copies}", found=f"no folder {place}",
            remedy=f"hf download {source.name} --repo-type dataset --local-dir {copies / source.name}",
        )  # fmt: skip
    splits = data_files(place, config).splits
    if source.split not in splits:
        raise TaskError(
            f"a copy of data set {source} must have that split",
            found=f"{', '.join(splits)} in {place}",
            remedy="take the copy from the Hub as it is",
        )
    files = splits[source.split]
    if all(path.suffix == ".parquet" for path in files) and sum(path.stat().st_size for path in files) > MAX_IN_MEMORY:
        listed = [str(path) for path in files]
        return datasets.load_dataset("parquet", data_files={source.split: listed}, split=source.split)
    return datasets.Dataset.from_list([dict(row) for path in files for row in read_table(path)])


def _from_hub(source: Public) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.name, source.config, split=source.split)
    except Exception as error:  # The loader passes on what its readers, the Hub and the network raise: no common class.
        raise TaskError(
            f"data set {source} must load with the package 'datasets'",
            found=f"{type(error).__name__}: {shorten(str(error), 200)}",
            remedy="check the network; or put a copy below a folder and name the suite as SUITE@FOLDER",
        ) from error


def choice(source: str, options: Sequence[str], right: int, **more: Any) -> dict[str, Any]:
    """The fields of a row whose options are ranked; a repeated option stands once.

    Raises:
        ValueError: if the right option is none of them, as where a data set hides its answers.
    """
    if not 0 <= right < len(options):
        raise ValueError(f"right option {right} of {len(options)}")
    return {"source": source, "target": options[right], "options": list(dict.fromkeys(options)), **more}


def made_of(rows: Iterable[Mapping[str, Any]], fields: Callable[[Mapping[str, Any]], R], where: object) -> Iterator[R]:
    """What `fields` makes of each row of a data set.

    Raises:
        TaskError: if a row is not what `fields` knows.
    """
    for number, row in enumerate(rows):
        try:
            yield fields(row)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise TaskError(
                f"{where}, row {number}: a row must be laid out as its data set is on the Hub",
                found=f"{type(error).__name__} {error}",
                remedy="take the copy from the Hub as it is",
            ) from error


def suite_task(
    name: str, records: Iterable[Mapping[str, Any]], where: object, *, family: str, metric: str, role: str = "heldout"
) -> Task:
    """A task out of the fields of its rows; rows that cannot be scored are left out, and a warning says how many.

    Public data hold a few rows without an answer, or with equal options.

    Args:
        name: of the task.
        records: fields of rows; `split` is test where absent.
        where: the data set, for errors.
        family: of the task.
        metric: of the task.
        role: of the task.

    Raises:
        TaskError: if no row is left.
    """
    rows: list[Row] = []
    reasons: list[str] = []
    for record in records:
        try:
            rows.append(parse_row({"task": name, "split": "test", **record}, str(where)))
        except TaskError as error:
            reasons.append(f"{error.rule.partition(': ')[2]} ({error.found})")
    if reasons and rows:
        message = f"task '{name}': {len(reasons)} of {len(reasons) + len(rows)} rows of {where} were left out"
        warnings.warn(f"{message}; the first: {reasons[0]}", stacklevel=2)
    if reasons and not rows:
        raise TaskError(f"{where}: task '{name}' must have rows that follow the format", found=reasons[0])
    return make_task(name, rows, str(where), family=family, role=role, metric=metric)
