"""Where the shards of a build are worked on: in this process or on other machines, behind one small interface.

The library folder holds the state: work commits what it finishes there, and an executor carries no results. So any of
them may be killed at any moment, and any other goes on from what the folder holds.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable


@runtime_checkable
class WorkItem(Protocol):
    """A piece of a build that one process works on: plain data that can be pickled."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the experts in it."""

    @property
    def library(self) -> str:
        """Folder of the library, which every process that works on the build must see."""

    def on(self, device: str) -> "WorkItem":
        """The same piece, to be worked on with a device that an executor chose."""


S = TypeVar("S", bound=WorkItem)


@runtime_checkable
class Executor(Protocol):
    """Runs a function on each shard of a build."""

    def run(self, work: Callable[[S], None], shards: Sequence[S]) -> None:
        """Work on all shards, and return when all are done.

        Args:
            work: what to do with one shard; takes up a shard that an earlier try left half done.
            shards: in the order in which they shall be begun.

        Raises:
            LoraryError: if a shard cannot be finished. What was committed stays.
        """


class LocalExecutor:
    """Works on one shard after the other in this process. The first error ends the run."""

    def run(self, work: Callable[[S], None], shards: Sequence[S]) -> None:
        """As `Executor.run`."""
        for shard in shards:
            work(shard)
