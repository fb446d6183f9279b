"""Where the shards of a build are worked on: in this process or on other machines, behind one small interface.

The library folder is the ledger: work commits what it finishes there, and an executor carries no results. So any of
them may be killed at any moment, and any other goes on from what the ledger holds.
"""

import re
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from lorary.errors import UsageError
from lorary.numbers import check_count


@runtime_checkable
class Shard(Protocol):
    """A piece of a build that one process works on: plain data that can be pickled."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the experts in it."""

    @property
    def library(self) -> str:
        """Folder of the library, which every process that works on the build must see."""


S = TypeVar("S", bound=Shard)


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


def make_executor(
    reference: str, *, workers: int | None = None, say: Callable[[str], None] | None = None, debug: bool = False
) -> Executor:
    """The executor that a word stands for.

    Args:
        reference: 'local'; 'ray' (the cluster in RAY_ADDRESS, or one started on this machine for the run alone);
            'ray://auto' (the cluster this machine belongs to); 'ray://HOST' or 'ray://HOST:PORT' (Ray Client).
        workers: Ray workers; where None, one per GPU of the cluster, or per machine where it has none.
        say: told lines of progress; where None they go to stderr.
        debug: show Ray's own log too.

    Raises:
        UsageError: if there is no such executor, or fewer than one worker.
        MissingExtraError: if Ray is asked for and not installed.
    """
    if workers is not None:
        check_count("--workers", workers)
    if reference == "local":
        return LocalExecutor()
    if not re.fullmatch(r"ray|ray://[^/\s]+/?", reference):
        raise UsageError("--executor must be local, ray, ray://auto or ray://HOST[:PORT]", found=reference)
    # Ray's part is imported for those who ask for it, since the package is an extra.
    from lorary.train.ray_pool import RayExecutor

    address = {"ray": None, "ray://auto": "auto"}.get(reference.rstrip("/"), reference.rstrip("/"))
    return RayExecutor(address, workers, say=say, debug=debug)
