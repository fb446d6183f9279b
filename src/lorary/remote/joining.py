"""What becomes of two libraries that were one once: an entry that one side changed goes by that side."""

from collections.abc import Mapping
from dataclasses import dataclass

from lorary.errors import LibraryError
from lorary.library.layout import ADAPTERS, DERIVED, RESULTS
from lorary.remote.entries import LIBRARY, Entries, digest_of

# The content of each entry when the two were last the same, by its digest.
Agreed = Mapping[str, str]


@dataclass(frozen=True)
class Joined:
    """Two libraries together.

    Args:
        entries: all of both, but results, which are joined by line.
        conflicts: entries that both changed, each otherwise; `entries` has the side that a pull or push is for.
    """

    entries: Entries
    conflicts: list[str]


def join(agreed: Agreed, mine: Entries, theirs: Entries) -> Joined:
    """Join by three states. What only one side has changed, added or removed is as on that side.

    Derived data that both have is the same but for how it was computed, so that what is there (`theirs`) stays.

    Args:
        agreed: what both had last.
        mine: wins where both changed an entry, which is named as a conflict.
        theirs: the other one.
    """
    entries: Entries = {}
    conflicts = []
    for entry in sorted({*mine, *theirs} - {RESULTS}):
        ours, other = mine.get(entry), theirs.get(entry)
        before, ours_now, other_now = agreed.get(entry), _digest(mine, entry), _digest(theirs, entry)
        if ours_now == other_now or other_now == before:
            chosen = ours
        elif ours_now == before or entry.startswith(f"{DERIVED}/"):
            chosen = other
        else:
            conflicts.append(entry)
            chosen = ours
        if chosen is not None:
            entries[entry] = chosen
    return Joined(entries, conflicts)


def agreed_after(agreed: Agreed, local: Entries, remote: Entries) -> dict[str, str]:
    """What both have, once `remote` lies there and `local` here: entries that differ keep what was agreed before."""
    return {
        entry: digest
        for entry in sorted({*agreed, *local, *remote} - {RESULTS})
        if (digest := _digest(local, entry) if _digest(local, entry) == _digest(remote, entry) else agreed.get(entry))
    }


def check_conflicts(conflicts: list[str], library: object, url: str, remedy: str) -> None:
    """Refuse to choose between two changes of one entry.

    Args:
        conflicts: the entries.
        library: the folder here.
        url: the place there.
        remedy: what to do.

    Raises:
        LibraryError: naming the adapters.
    """
    if conflicts:
        shown = ", ".join(map(_shown, conflicts[:10])) + (f" and {len(conflicts) - 10} more" * (len(conflicts) > 10))
        raise LibraryError(
            f"an adapter must have been changed on one side only, in {library} or at {url}",
            found=f"changed on both: {shown}",
            remedy=remedy,
        )


def _shown(entry: str) -> str:
    if entry == LIBRARY:
        return "the default router"
    return f"adapter '{entry.removeprefix(ADAPTERS + '/')}'"


def _digest(entries: Entries, entry: str) -> str | None:
    files = entries.get(entry)
    return None if files is None else digest_of(files)
