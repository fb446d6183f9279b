"""What a snapshot of a library is, and what a rollback did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """A state of a library that can be gone back to.

    Args:
        name: of it.
        digest: sha256 that tells its content.
        adapters: names of the adapters that it holds.
        created: when it was made, in UTC.
    """

    name: str
    digest: str
    adapters: list[str]
    created: str


@dataclass(frozen=True)
class Rollback:
    """What a rollback changed.

    Args:
        snapshot: name of the snapshot that the library is as now.
        before: name of the snapshot of what the library was, to go back to; None where nothing was to be changed.
        restored: adapters that came back, or became what they were.
        removed: adapters that the snapshot does not hold.
    """

    snapshot: str
    before: str | None
    restored: list[str]
    removed: list[str]
