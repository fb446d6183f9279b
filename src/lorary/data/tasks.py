"""Tasks by reference: `builtin`, a JSONL file, a folder, a suite, or a Hugging Face data set."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from lorary.data.builtin.catalogue import builtin_tasks
from lorary.data.columns import OURS, NamedColumns, known_form, parse_columns
from lorary.data.dataset_folder import check_inside, data_files
from lorary.data.hub import is_dataset_folder, is_dataset_path, read_dataset
from lorary.data.jsonl import iter_records, iter_rows
from lorary.data.manifest import MANIFEST, read_manifest
from lorary.data.schema import SPLITS, Row, Task, make_task, shorten
from lorary.data.suites import SUITES, is_suite, load_suite, suite_tasks
from lorary.errors import LoraryError, TaskError, UsageError

__all__ = ["SPLITS", "Row", "Task", "iter_rows", "load_tasks", "select_tasks"]

BUILTIN = "builtin"
DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def load_tasks(
    reference: str | Path, *, names: Sequence[str] | None = None, columns: str | None = None
) -> dict[str, Task]:
    """Load tasks from wherever they are; the network is used only where the reference is a data set's id.

    A path that exists is always taken as a path. With `names`, only the files that hold them are read: those the
    manifest gives, or those called NAME.jsonl where there is none.

    Args:
        reference: `builtin`, a .jsonl file, a folder with a manifest.json, a folder of .jsonl files, a data folder or
            file (.csv, .tsv, .json, .parquet, .arrow), a suite (a name in `SUITES`, or NAME@FOLDER for copies of its
            data sets), or a data set's id ("user/name", "user/name:config").
        names: the tasks to load; None loads all of them.
        columns: which columns of files of one's own hold what, as `lorary.data.columns.parse_columns` reads it; None
            for those of the row format and of known kinds.

    Returns:
        Tasks by name, sorted by name.

    Raises:
        UsageError: if nothing is there, a name is not among the tasks (near matches are listed), or columns are named
            for tasks that are no files of one's own.
        TaskError: if rows, a manifest or a data set do not follow the format.
    """
    selection = None if names is None else frozenset(names)
    path = Path(reference)
    named_columns = None if columns is None else parse_columns(columns)
    if columns is not None and (reference == BUILTIN or (not path.exists() and is_suite(str(reference)))):
        raise UsageError("--columns is for files and data sets of your own", found=reference, remedy="leave it out")
    if reference == BUILTIN:
        tasks = builtin_tasks()
    elif path.is_dir():
        tasks = _load_folder(path, selection, named_columns)
    elif path.exists() and not is_dataset_path(path):
        tasks = _gather(_rows_of(path, named_columns), str(path))
    elif not path.exists() and is_suite(str(reference)):
        suite = suite_tasks(str(reference))
        _check_names(suite, selection, str(reference))
        tasks = load_suite(str(reference), suite if selection is None else selection)
    else:
        if not path.exists() and not _is_dataset_id(str(reference)):
            raise UsageError(
                "the tasks must be 'builtin', a file or folder that exists, "
                f"a suite ({', '.join(SUITES)}), or the id of a data set (user/name)",
                found=reference,
                remedy="check the path",
            )
        tasks = _gather(read_dataset(reference, named_columns), str(reference))
    return select_tasks(tasks, names, str(reference))


def _is_dataset_id(reference: str) -> bool:
    # `data/missing` is a mistyped path where ./data exists; nobody's data set should be fetched for it.
    path = Path(reference)
    is_path = path.suffix == ".jsonl" or is_dataset_path(path) or path.parent.exists()
    return DATASET_ID.fullmatch(reference) is not None and not is_path


def _load_folder(folder: Path, selection: frozenset[str] | None, columns: NamedColumns | None) -> dict[str, Task]:
    if (folder / MANIFEST).is_file():
        if columns is not None:
            raise UsageError(f"--columns is for data without a {MANIFEST}", found=folder / MANIFEST,
                             remedy="name one of its files, or write the rows with the fields of a row")  # fmt: skip
        return _load_manifest(folder, selection)
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        if not is_dataset_folder(folder):
            raise TaskError(
                f"{folder}: a folder of tasks must hold {MANIFEST}, .jsonl files, or a data set",
                found=", ".join(sorted(shorten(path.name) for path in folder.iterdir())[:5]) or "none of them",
                remedy="check the path; archives, pickled data and scripts are never opened",
            )
        return _gather(read_dataset(folder, columns), str(folder))
    for file in files:
        if file.is_symlink():
            check_inside(file, folder)
    if not any(_has_fields(file) for file in files) and data_files(folder).names_split:
        return _gather(read_dataset(folder, columns), str(folder))
    named = [file for file in files if file.stem in (selection or ())]
    if selection is not None and {file.stem for file in named} == selection:
        tasks = _load_files(named, columns)
        if selection <= tasks.keys():
            return tasks
    return _load_files(files, columns)


def _load_files(files: Sequence[Path], columns: NamedColumns | None) -> dict[str, Task]:
    tasks: dict[str, Task] = {}
    origin: dict[str, Path] = {}
    for file in files:
        for name, task in _gather(_rows_of(file, columns), str(file)).items():
            if name in tasks:
                raise TaskError(
                    f"task '{name}' must be defined in one file",
                    found=f"{origin[name]} and {file}",
                    remedy="remove one of the files, or rename the task",
                )
            tasks[name], origin[name] = task, file
    return tasks


def _rows_of(file: Path, columns: NamedColumns | None) -> Iterable[Row]:
    """The rows of a JSONL file: with all fields of a row, or with columns as people have them."""
    if columns is None and (file.suffix.lower() != ".jsonl" or _has_fields(file)):
        return iter_rows(file)
    return read_dataset(file, columns)


def _has_fields(file: Path) -> bool:
    """Whether a JSONL file holds rows in the row format, by its first line; whoever reads it says what is wrong."""
    try:
        _, record = next(iter_records(file, "task"))
    except (StopIteration, LoraryError):
        return True
    if not isinstance(record, dict):
        return True
    return known_form(list(record)) in (OURS, None) and bool({"task", "split"} & set(record))


def _load_manifest(folder: Path, selection: frozenset[str] | None) -> dict[str, Task]:
    entries = read_manifest(folder)
    _check_names(entries.keys(), selection, str(folder / MANIFEST))
    chosen = entries if selection is None else {name: entries[name] for name in selection}
    tasks: dict[str, Task] = {}
    for file in sorted({entry.file for entry in chosen.values()}):
        declared = {name for name, entry in entries.items() if entry.file == file}
        grouped = _group(iter_rows(file))
        if stray := sorted(grouped.keys() - declared):
            raise TaskError(
                f"{file}: every task of a file must stand in {folder / MANIFEST}",
                found=", ".join(shorten(name) for name in stray[:5]),
                remedy="add an entry for it, or correct the field 'task' of the rows",
            )
        for name in declared & chosen.keys():
            entry = entries[name]
            rows = grouped.get(name, [])
            tasks[name] = make_task(name, rows, str(file), family=entry.family, role=entry.role, metric=entry.metric)
    return tasks


def _gather(rows: Iterable[Row], where: str) -> dict[str, Task]:
    grouped = _group(rows)
    if not grouped:
        raise TaskError(f"{where}: a task must have rows", found="no rows at all", remedy="add rows, or leave it out")
    return {name: make_task(name, members, where) for name, members in grouped.items()}


def _group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.task, []).append(row)
    return grouped


def select_tasks(tasks: Mapping[str, Task], names: Iterable[str] | None, where: str) -> dict[str, Task]:
    """Some of the tasks, sorted by name.

    Args:
        tasks: by name.
        names: those to take; all where None.
        where: they come from, for errors.

    Raises:
        UsageError: if a name is not among the tasks (near matches are listed).
    """
    selection = None if names is None else frozenset(names)
    _check_names(tasks.keys(), selection, where)
    return {name: tasks[name] for name in sorted(tasks if selection is None else selection)}


def _check_names(available: Collection[str], selection: frozenset[str] | None, where: str) -> None:
    unknown = sorted((selection or frozenset()) - set(available))
    if not unknown:
        return
    near = sorted({match for name in unknown for match in difflib.get_close_matches(name, available, n=3)})
    listed = ", ".join(near or sorted(available)[:10])
    raise UsageError(
        f"{where}: the tasks named must be among its {len(available)} tasks",
        found=", ".join(shorten(name) for name in unknown[:5]),
        remedy=f"{'did you mean' if near else 'there are, for example,'} {listed}{'?' if near else ''}",
    )
