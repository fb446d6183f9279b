"""`lorary library add`: takes adapters of anywhere into a library; each that cannot go in is named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorary.display import Display
from lorary.errors import LibraryError, LoraryError, UsageError, did_you_mean
from lorary.library.opening import created_for
from lorary.library.sources import adapter_folders
from lorary.library.store import Library


@dataclass(frozen=True)
class FailedAdapter:
    """An adapter that could not go in.

    Args:
        path: its folder.
        rule: what it breaks.
        found: the offending value.
        remedy: what to do about it.
    """

    path: str
    rule: str
    found: str | None
    remedy: str | None


@dataclass(frozen=True)
class AddResult:
    """What went into a library.

    Args:
        library: its path.
        added: names of the adapters.
        failed: those that could not go in.
    """

    library: str
    added: list[str]
    failed: list[FailedAdapter]


def run_add(
    library_path: str,
    paths: Sequence[str],
    *,
    name: str | None = None,
    tasks: Mapping[str, Sequence[str]] | None = None,
    base: str | None = None,
    force_base: bool = False,
) -> AddResult:
    """Copy adapters into a library, each for itself: one that cannot go in is said, and the others go in.

    Args:
        library_path: folder of the library; made where there is none and a base is named.
        paths: folders of adapters, as `lorary.library.sources.adapter_folders` takes them.
        name: of the adapter, where there is one.
        tasks: by name, the tasks that an adapter was trained on.
        base: of a new library; checked against that of one that is there.
        force_base: take adapters of other weights of the same shapes.

    Returns:
        What went in, and what did not.

    Raises:
        UsageError: if a name is given for several adapters, or tasks for one that is not among them.
        LibraryError: if there is no library and no base, or of several adapters none could go in.
        LoraryError: of a single adapter, as `Library.add`.
    """
    folders = adapter_folders(paths)
    if name is not None and len(folders) > 1:
        raise UsageError("--name is for one adapter", found=f"{len(folders)} adapters", remedy="add that one by itself")
    names = [name or folder.resolve().name for folder in folders]
    if strange := sorted(set(tasks or ()) - set(names)):
        remedy = did_you_mean(strange[0], names, remedy=f"they are {', '.join(names[:10])}")
        raise UsageError("--tasks must name adapters that are added", found=strange[0], remedy=remedy)
    with created_for(library_path, base) as library:
        added, errors = _add_each(library, dict(zip(folders, names, strict=True)), tasks or {}, force_base=force_base)
        if not added:
            if len(folders) == 1:
                raise next(iter(errors.values()))
            raise LibraryError(
                f"at least one of {len(folders)} adapters must fit to go into {library_path}",
                found="none of them",
                remedy="see what is said of each",
            )
    failed = [FailedAdapter(str(path), error.rule, error.found, error.remedy) for path, error in errors.items()]
    return AddResult(library_path, added, failed)


def _add_each(
    library: Library, names: Mapping[Path, str], tasks: Mapping[str, Sequence[str]], *, force_base: bool
) -> tuple[list[str], dict[Path, LoraryError]]:
    """The names of those that went in, and by folder the errors of the others, which are said at once."""
    display, added, errors = Display(), dict[str, Path](), dict[Path, LoraryError]()
    for folder, name in names.items():
        try:
            if name in added:
                raise LibraryError(
                    f"adapters must have names of their own, and '{name}' is the name of two folders",
                    found=f"{added[name]} and {folder}",
                    remedy=f"lorary library add {library.path} {folder} --name OTHER",
                )
            library.add(folder, name, tasks=tasks.get(name), force_base=force_base)
            added[name] = folder
        except LoraryError as error:
            errors[folder] = error
            if len(names) > 1:
                display.say(f"not added: {folder}: {error}")
    return list(added), errors
