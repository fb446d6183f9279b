"""Rows out of Hugging Face data sets: an id on the Hub, or a local folder or file laid out as data sets are."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.data.columns import NamedColumns, naming_columns, record_of
from lorary.data.dataset_folder import DataFiles, data_files
from lorary.data.division import divide
from lorary.data.schema import SPLITS, Row, parse_row, shorten
from lorary.data.tables import READERS, read_table
from lorary.errors import TaskError

# The names under which data sets keep their splits, and ours.
SPLIT_NAMES = {split: split for split in SPLITS} | {"validation": "val", "dev": "val"}
# Files that are a data set by themselves; JSONL files are rows of ours, which name task and split.
SINGLE = frozenset(READERS) - {".jsonl"}


def is_dataset_path(path: Path) -> bool:
    """Whether this file is a data set by its ending."""
    return path.suffix.lower() in SINGLE


def is_dataset_folder(folder: Path) -> bool:
    """Whether the folder or one below it holds data files; no deeper, to be quick anywhere."""
    return any(path.suffix.lower() in READERS for pattern in ("*", "*/*") for path in folder.glob(pattern))


def read_dataset(reference: str | Path, columns: NamedColumns | None = None) -> list[Row]:
    """The rows of a data set, split by split.

    Columns: those that are asked for, else of a known kind (`lorary.data.columns`); where present also `task` (by
    default the data set's name), `split` (by default the data set's own), `family`, `options`, `targets` and `extra`.
    Without a column `extra`, all other columns are gathered there. Where nothing says a split, rows are divided. No
    code that comes with a data set is ever run.

    Args:
        reference: "user/name", "user/name:config", or the path of a folder or file.
        columns: which columns hold what.

    Returns:
        Rows in the order of the data set.

    Raises:
        TaskError: if the data set cannot be loaded, has a split with another name, or a row does not follow the
            format; names the data set, the split and the row.
    """
    place = Path(str(reference).partition(":")[0])
    task = place.resolve().name if place.is_dir() else place.stem
    rows: list[Row] = []
    undivided: list[Row] = []
    for name, table in _splits(reference):
        where = f"data set '{reference}'" + (f", split '{name[:80]}'" if name else "")
        if name not in (*SPLIT_NAMES, None):
            raise TaskError(
                f"{where}: a split must be called {', '.join(SPLIT_NAMES)}",
                found=shorten(name),
                remedy="save the rows as JSONL with a field 'split', and name that file",
            )
        for index, row in enumerate(table):
            record, turns = record_of(row, columns, f"{where}, row {index}")
            defaults = {"task": task, "split": SPLIT_NAMES[name or "train"]}
            try:
                parsed = replace(parse_row(defaults | record, f"{where}, row {index}"), turns=turns)
            except TaskError as error:
                raise naming_columns(error, row, columns) from None
            (rows if name or "split" in record else undivided).append(parsed)
    return [*rows, *(divide(undivided, str(reference)) if undivided else [])]


def _splits(reference: str | Path) -> Iterator[tuple[str | None, Iterable[Mapping[str, Any]]]]:
    """The rows of each split by its name, None where nothing says one."""
    path = Path(reference)
    if path.exists():
        files = data_files(path) if path.is_dir() else DataFiles({"train": [path]}, names_split=False)
        for name, split_files in files.splits.items():
            rows = (row for file in split_files for row in read_table(file, files.delimiter))
            yield name if files.names_split else None, rows
    else:
        yield from _load(str(reference)).items()


def _load(reference: str) -> Mapping[str, Any]:
    # Slow to import (1-2 s), and most tasks are JSONL or builtin.
    import datasets

    name, _, config = reference.partition(":")
    try:
        data_set = datasets.load_dataset(name, config or None)
        if any(rows.info.builder_name == "csv" for rows in data_set.values()):
            # Texts as they stand, where `datasets` would make numbers of them, and nothing of NA.
            data_set = datasets.load_dataset(name, config or None, dtype=str, keep_default_na=False)
    except Exception as error:  # The loader passes on what its readers, the Hub and the network raise: no common class.
        raise TaskError(
            f"data set '{reference}' must load with the package 'datasets'",
            found=f"{type(error).__name__}: {shorten(str(error), 200)}",
            remedy="check the id (user/name or user/name:config), the network and, for private ones, the login",
        ) from error
    loaded: Mapping[str, Any] = data_set
    return loaded
