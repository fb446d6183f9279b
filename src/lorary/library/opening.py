"""Opening what a command names: its library, its base model, and the template the experts were trained with."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorary.errors import LibraryError, UsageError
from lorary.formats.base import resolve_base
from lorary.library.base import check_same_base
from lorary.library.document import OWN_TRACES
from lorary.library.fingerprint_folder import fingerprint_of_folder
from lorary.library.handles import opened
from lorary.library.layout import BUILD_FOLDER, LIBRARY_FILE
from lorary.library.listing import local_folder
from lorary.library.store import Library
from lorary.route import ROUTERS
from lorary.route.setting import Routing


def open_or_create(path: str, base: str | None) -> Library:
    """Open a library, or make it where there is none and a base model is named.

    Args:
        path: folder of the library.
        base: the base model for a new library; checked against the library's own where there is one already.

    Returns:
        The library.

    Raises:
        LibraryError: if there is no library and no base.
        BaseModelError: if the library has another base.
    """
    return _open_or_create(path, base)[0]


def _open_or_create(path: str, base: str | None) -> tuple[Library, bool]:
    """The library, and whether it was made here."""
    folder = local_folder(path)
    if base is not None and is_vacant(folder):
        try:
            library = Library.create(path, base)
            # Whoever makes a library by a command has not thought of routers yet; an older library keeps its own.
            settings = Routing.of("auto", **ROUTERS["auto"].defaults).to_json()
            library.set_default_router({key: value for key, value in settings.items() if value is not None})
            return library, True
        except LibraryError:
            if not (folder / LIBRARY_FILE).exists():  # else somebody made it at the same time
                raise
    if base is None and is_vacant(folder):
        raise LibraryError(f"{path} must be a library", found="nothing is there", remedy="--base MODEL makes it")
    library = Library.open(path)
    if base is not None and base != library.base.name:
        fingerprint = fingerprint_of_folder(resolve_base(base).path)
        check_same_base(library.base, fingerprint, f"--base {base}", force_base=False)
    return library, False


def is_vacant(folder: Path) -> bool:
    """Whether there is nothing, or no more than a `create` that was killed may leave."""
    return not folder.exists() or (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= OWN_TRACES)


@contextmanager
def created_for(path: str, base: str | None) -> Iterator[Library]:
    """Open a library or make it, for work that may be refused: one made here for nothing goes again.

    Args:
        path: folder of the library.
        base: as for `open_or_create`.

    Yields:
        The library.

    Raises:
        LoraryError: as for `open_or_create`.
    """
    was_folder = Path(path).exists()
    library, is_new = _open_or_create(path, base)
    try:
        yield library
    except BaseException:
        if is_new:
            _remove_unused(library, keep_folder=was_folder)
        raise


def _remove_unused(library: Library, *, keep_folder: bool) -> None:
    """Remove a library that nothing was put into, unless another build has begun on it meanwhile."""
    with suppress(LibraryError), library.build_lock():
        # What the next run takes up: a checkpoint, adapters of an earlier stage, candidates that were tried.
        patterns = ("**/*.safetensors", "*-search-*.json", "*-retrieved.json")
        is_started = any(any((library.path / BUILD_FOLDER).glob(pattern)) for pattern in patterns)
        if not library.names() and not is_started:
            with opened(library.path) as folder:
                for name in folder.names():
                    (folder.remove_folder if folder.kind(name) == "folder" else folder.remove_file)(name)
            if not keep_folder:
                library.path.rmdir()


def template_of(library: Library, requested: str | None) -> str:
    """The prompt template to use: the one asked for, else the one all experts were trained with, else plain.

    Raises:
        LibraryError: if an expert was trained with another template than the one in use.
    """
    trained: dict[str, str] = {}
    for name in library.names():
        template = library.provenance(name).get("template")
        if template is not None:
            trained.setdefault(str(template), name)
    chosen = requested or next(iter(sorted(trained)), "plain")
    for template, name in trained.items():
        if template != chosen:
            raise LibraryError(
                f"expert '{name}' must be used with the template it was trained with",
                found=f"trained with {template}, in use {chosen}",
                remedy=f"--template {template}",
            )
    return chosen


def base_of(library: Library, base: str | None) -> str:
    """The reference of the base model to load: the one named, else the library's own.

    Raises:
        UsageError: if the library was made for a live model, which has no reference.
    """
    reference = base or library.base.name
    if not reference:
        raise UsageError("the library's base model has no name to load it by", found="none", remedy="--base MODEL")
    return reference
