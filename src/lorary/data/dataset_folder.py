"""Which files of a local data folder hold which split: files of the folder alone, by lists, without a network.

A README.md may say so in its head (`configs`, as on the Hugging Face Hub); otherwise the names of folders and files do.
Archives, pickled data and scripts are never opened.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from lorary.data.schema import shorten
from lorary.data.strict_yaml import strict_yaml
from lorary.data.tables import READERS
from lorary.errors import TaskError, UsageError
from lorary.reading import first_twice, read_regular

MAX_FILES = 100_000
# Notes that lie beside data, and never hold rows.
NOTES = frozenset({
    "README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
})  # fmt: skip
# Words by which folders and files say their split, in the order in which they are looked for.
WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
         "test": ("test", "testing", "eval", "evaluation")}  # fmt: skip
SHARDED = re.compile(r"data/(?P<split>.+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_EDGE = r"[-._ 0-9]"
# Fields of a README's config that say nothing about how a file is read.
CONFIG_NOTES = frozenset({"config_name", "data_files", "data_dir", "default", "description", "drop_labels", "version"})


@dataclass(frozen=True)
class DataFiles:
    """Files of a data folder.

    Args:
        splits: by the names of splits, in order.
        delimiter: between cells of CSV files, where the README gives one.
        names_split: whether a README or the names of files and folders say a split; else all files are in one.
    """

    splits: Mapping[str, Sequence[Path]]
    delimiter: str | None = None
    names_split: bool = True


def data_files(folder: Path, config: str | None = None) -> DataFiles:
    """The files of each split.

    Args:
        folder: of the data set.
        config: name of one of the README's configurations; the default one, or the only one, where None.

    Raises:
        TaskError: if there are none, the README names others than files of the folder, or a link leads out of it.
        UsageError: if a configuration must be named.
    """
    configs = _configs(folder)
    if not configs:
        return _by_name(folder, _listed(folder, folder))
    chosen = _chosen(configs, config, folder)
    where = f"{folder / 'README.md'}, config '{chosen.get('config_name', 'default')}'"
    if strange := sorted(set(chosen) - CONFIG_NOTES - {"sep", "delimiter"}):
        raise TaskError(f"{where}: a field that says how files are read must be 'sep' or 'delimiter'",
                        found=", ".join(map(str, strange)), remedy="save the rows as JSONL")  # fmt: skip
    delimiter = chosen.get("sep", chosen.get("delimiter"))
    if delimiter is not None and (not isinstance(delimiter, str) or len(delimiter) != 1):
        raise TaskError(f"{where}: a delimiter must be one character", found=shorten(delimiter))
    below = _inside(chosen["data_dir"], where) if chosen.get("data_dir") else ""
    files = _listed(folder, folder / below)
    if chosen.get("data_files") is None:
        return replace(_by_name(folder / below, files), delimiter=delimiter)
    named = _patterns(chosen["data_files"], where)
    splits = {split: _matching(patterns, folder / below, files, where) for split, patterns in named.items()}
    return DataFiles(splits, delimiter)


def _configs(folder: Path) -> list[dict[str, Any]]:
    """What the head of a README says of files; nothing where it does not."""
    readme = folder / "README.md"
    if not os.path.lexists(readme):
        return []
    try:
        text = read_regular(readme).decode("utf-8-sig")
    except OSError as error:
        raise TaskError(f"{readme} must be readable", found=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{readme} must be UTF-8", found=error.reason, remedy="save it as UTF-8") from error
    head = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    if head is None:
        return []
    document = strict_yaml(head[1], f"the head of {readme}")
    listed = document.get("configs") if isinstance(document, dict) else None
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise TaskError(f"{readme}: 'configs' must be a list of mappings", found=shorten(listed))
    return listed


def _chosen(configs: Sequence[dict[str, Any]], config: str | None, folder: Path) -> dict[str, Any]:
    names = [str(entry.get("config_name", "default")) for entry in configs]
    matches = [entry for entry, name in zip(configs, names, strict=True) if config is not None and name == config]
    if config is None:
        matches = [entry for entry, name in zip(configs, names, strict=True)
                  if entry.get("default") is True or name == "default" or len(configs) == 1]  # fmt: skip
    if not matches:
        raise UsageError(f"data folder {folder} has several configurations, one of which must be meant",
                         found=config or "none named", remedy=f"there are {', '.join(names)[:200]}; keep the one "
                         "that is meant in the README, or mark it 'default: true'")  # fmt: skip
    return matches[0]


def _patterns(named: object, where: str) -> dict[str, list[str]]:
    """Patterns of files by split, in each form in which a README may write them."""
    if isinstance(named, str):
        named = [named]
    if isinstance(named, dict):
        named = [{"split": split, "path": path} for split, path in named.items()]
    if not isinstance(named, list) or not named:
        raise TaskError(f"{where}: 'data_files' must name files", found=shorten(named))
    splits: dict[str, list[str]] = {}
    for entry in named:
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        paths = [entry["path"]] if isinstance(entry.get("path"), str) else entry.get("path")
        if not isinstance(entry.get("split"), str) or not isinstance(paths, list):
            raise TaskError(f"{where}: an entry of 'data_files' must have 'split' and 'path'", found=shorten(entry))
        splits.setdefault(entry["split"], []).extend(_inside(path, where) for path in paths)
    return splits


def _inside(pattern: object, where: str) -> str:
    """A path or pattern as it stands, if it can only name files of the folder."""
    if not isinstance(pattern, str) or "://" in pattern or "::" in pattern or "\\" in pattern or "\0" in pattern:
        raise _outside(pattern, where)
    path = PurePosixPath(pattern)
    if path.is_absolute() or pattern.startswith("~") or ".." in path.parts:
        raise _outside(pattern, where)
    return str(path)


def _outside(pattern: object, where: str) -> TaskError:
    return TaskError(
        f"{where}: a data set must be made of files of its own folder",
        found=shorten(pattern),
        remedy="put the file into the folder, and name it by its path there",
    )


def _listed(folder: Path, below: Path) -> list[Path]:
    """All regular files below a folder, sorted; no link to a folder is followed, and none out of `folder`."""
    files: list[Path] = []
    for place, folders, names in os.walk(below):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted((*names, *(name for name in folders if (Path(place) / name).is_symlink()))):
            path = Path(place) / name
            if name in NOTES or name.startswith("."):
                continue
            if path.is_symlink():
                check_inside(path, folder)
            if path.is_file():
                files.append(path)
            elif path.suffix.lower() in READERS and not path.is_dir():
                raise TaskError(f"{path}: a data file must be a regular file", found="a link that leads nowhere"
                                if path.is_symlink() else "a pipe, socket or device",
                                remedy="put the file there, or remove it")  # fmt: skip
        if len(files) > MAX_FILES:
            raise TaskError(f"{folder}: a data folder must hold at most {MAX_FILES:,} files", found="more")
    return files


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a path of a data folder that leads out of it, or nowhere.

    Raises:
        TaskError: naming the path.
    """
    whole = folder.resolve()
    homes = [whole]
    # A snapshot in the Hub's cache is made of links to files beside it.
    if whole.parent.name == "snapshots":
        homes.append(whole.parent.parent / "blobs")
    try:
        end: Path | None = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        end = None
    if end is None or not any(end.is_relative_to(home) for home in homes):
        raise TaskError(
            f"{path}: a link in a data folder must stay inside it" if path.is_symlink()
            else f"{path}: a file of a data folder must lie inside it",
            found="a link that leads to itself" if end is None else end,
            remedy="copy the file into the folder",
        )  # fmt: skip


def _by_name(folder: Path, files: Sequence[Path]) -> DataFiles:
    """The files of each split by the names of files and folders: the Hub's own rules, in their order."""
    candidates = _one_kind(folder, files)
    paths = {path.relative_to(folder).as_posix(): path for path in candidates}
    sharded: dict[str, list[Path]] = {}
    for name, path in paths.items():
        if match := SHARDED.fullmatch(name):
            sharded.setdefault(match["split"], []).append(path)
    if sharded:
        return DataFiles(_checked_splits(folder, candidates, sharded))
    for form in (r"(.*/)?(?:[^/]*{edge})?{word}({edge}[^/]*)?/.*", r"(.*/)?(?:[^/]*{edge})?{word}{edge}[^/]*"):
        splits: dict[str, list[Path]] = {}
        for split, words in WORDS.items():
            shape = re.compile(form.format(edge=_EDGE, word=f"(?:{'|'.join(words)})"))
            if named := [path for name, path in paths.items() if shape.fullmatch(name)]:
                splits[split] = named
        if splits:
            return DataFiles(_checked_splits(folder, candidates, splits))
    return DataFiles({"train": candidates}, names_split=False)


def _checked_splits(folder: Path, candidates: Sequence[Path], splits: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """The splits, and a warning of files that are in none; a file that is in two is refused."""
    placed = [path for paths in splits.values() for path in paths]
    if len(set(placed)) < len(placed):
        twice = first_twice(placed)
        raise TaskError(f"{twice}: a data file must be of one split by its name", found=", ".join(
            split for split, paths in splits.items() if twice in paths), remedy="rename it")  # fmt: skip
    _warn_of(folder, [path for path in candidates if path not in set(placed)], "their names say no split")
    return splits


def _one_kind(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The files of the kind of which there are most: data sets are of one kind, and others lie beside them."""
    by_kind = {kind: [path for path in files if path.suffix.lower() == kind] for kind in READERS}
    kind = max(by_kind, key=lambda kind: len(by_kind[kind]))  # of equal ones the first
    if not by_kind[kind]:
        raise TaskError(
            f"{folder}: a data folder must hold files that end in {', '.join(READERS)}",
            found=", ".join(path.name for path in files[:5]) or "no file",
            remedy="archives and scripts are never opened: unpack them, or save the rows as JSONL",
        )
    _warn_of(folder, [path for path in files if path.suffix.lower() != kind], f"the rows are read from {kind} files")
    return by_kind[kind]


def _warn_of(folder: Path, skipped: Sequence[Path], reason: str) -> None:
    if skipped:
        names = ", ".join(path.relative_to(folder).as_posix() for path in skipped[:5])
        warnings.warn(f"data folder {folder}: {len(skipped)} files are left out ({names}): {reason}", stacklevel=2)


def _matching(patterns: Iterable[str], folder: Path, files: Sequence[Path], where: str) -> list[Path]:
    matched: dict[Path, None] = {}
    for pattern in patterns:
        parts = PurePosixPath(pattern).parts
        matches = [path for path in files if _fits(path.relative_to(folder).parts, parts)]
        if not matches:
            raise TaskError(f"{where}: 'data_files' must name files that are there", found=shorten(pattern),
                            remedy="correct the path, relative to the folder")  # fmt: skip
        if strange := [path for path in matches if path.suffix.lower() not in READERS]:
            raise TaskError(f"{where}: a data file must end in {', '.join(READERS)}",
                            found=str(strange[0].relative_to(folder)),
                            remedy="archives, pickled data and scripts are never opened: unpack it")  # fmt: skip
        matched.update(dict.fromkeys(matches))
    return list(matched)


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a pattern in which `**` stands for any folders; quick for any pattern."""
    reached = {0}
    for number, part in enumerate(pattern):
        if part == "**":
            first = min(reached, default=len(path) + 1)
            # At the end, files; elsewhere any number of folders, none among them.
            reached = (
                {len(path)} if number == len(pattern) - 1 and first < len(path) else {*range(first, len(path) + 1)}
            )
        else:
            reached = {at + 1 for at in reached if at < len(path) and fnmatchcase(path[at], part)}
    return len(path) in reached
