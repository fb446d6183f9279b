"""Another name for an adapter, in one atomic step.

Almost nothing in a library is kept by name alone: what was computed is found by names and content hashes together, so
that under another name it is not found, and nothing wrong ever is. What is known of the adapter alone follows it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorary.errors import LibraryError
from lorary.library.derived import derived_name, entry_of, iterate_keys, load_derived
from lorary.library.document import read_document
from lorary.library.folders import NewFolder, apply, change, check_free, check_name, check_there
from lorary.library.layout import ADAPTERS, DERIVED
from lorary.library.listing import provenance_in
from lorary.library.lock import build_lock
from lorary.route.setting import Routing


def rename_adapter(library: Path, check: Callable[[], None], old: str, new: str) -> tuple[list[str], list[str]]:
    """Give an adapter another name.

    Args:
        library: the library's folder.
        check: as for `lorary.library.folders.change`.
        old: its name.
        new: the name it gets.

    Returns:
        Kinds of derived data that followed, and kinds that have to be computed again.

    Raises:
        UsageError: if the new name cannot be one.
        LibraryError: if there is no such adapter, the name is taken, the default router or an assignment of skills
            names the adapter, a build is running, or the library cannot be written.
    """
    check_name(old)
    check_name(new)
    check()
    with build_lock(library), change(library, check) as root:
        check_there(root, old)
        if old == new:
            return [], []
        check_free(root, new, besides=old)
        digest = provenance_in(library / ADAPTERS / old, old)["content_hash"]
        if old in Routing.of(**read_document(library).default_router).named:
            raise LibraryError(
                f"adapter '{old}' must not be named by the default router to be renamed",
                found=f"library.json of {library} names it",
                remedy=f"change that first: lorary library router {library} --route FIELD=VALUE, or --reset",
            )
        followed, left, new_folders = set(), set(), list[NewFolder]()
        for kind, key in list(iterate_keys(library)):
            if [old, digest] in key.get("skills", ()):
                raise LibraryError(
                    f"adapter '{old}' must not be a skill of an assignment to be renamed",
                    found=f"{derived_name(kind, key)} in derived/ names it",
                    remedy="build the skills anew, or export this one and add it under another name",
                )
            if key.get("expert") == old and key.get("adapter") == digest:
                files = load_derived(library, kind, key) or {}
                now = {**key, "expert": new}
                new_folders.append((DERIVED, derived_name(kind, now), entry_of(kind, now, files)))
                followed.add(kind)
            elif any(_names(key.get(part), old, digest) for part in ("experts", "adapters")):
                left.add(kind)
        with root.enter(ADAPTERS) as adapters, adapters.enter(old) as folder:
            files = {file: folder.read(file, max_bytes=None) for file in folder.names()}
        apply(root, [*new_folders, (ADAPTERS, new, files)], gone=[old])
    return sorted(followed), sorted(left)


def _names(part: Any, name: str, digest: str) -> bool:
    return isinstance(part, Mapping) and part.get(name) == digest
