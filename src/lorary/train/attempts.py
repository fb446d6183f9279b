"""The shards of a run on several workers: which wait, which are done, and what follows where one fails."""

import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.errors import LoraryError, TrainError
from lorary.train.executor import WorkItem

RETRIES = 3  # of a shard whose worker died, or whose work failed for a reason that may pass
MAX_NAMES = 3  # of experts, in one line
NEXT_RUN = "what is finished stays in the library: run the same command again, with this or another --executor"


@dataclass(frozen=True)
class WorkerFailure:
    """Why a shard was not finished: an exception in words, since not every exception can be pickled.

    Args:
        error: the class, where it is one of Lorary's own: then trying again would not help.
        rule: as in `LoraryError`, or the exception's message.
        found: as in `LoraryError`.
        remedy: as in `LoraryError`.
        trace: the traceback.
    """

    error: type[LoraryError] | None
    rule: str
    found: str | None = None
    remedy: str | None = None
    trace: str = ""

    @property
    def text(self) -> str:
        """In one line."""
        line = self.rule if self.found is None else f"{self.rule}; found: {self.found}"
        return " ".join(line.split())[:400]

    def raised(self, where: str) -> LoraryError:
        """The exception again, with the words `where` before its rule."""
        kind = self.error or TrainError
        again = kind.__new__(kind)  # the constructors of subclasses differ, that of the base class is enough
        LoraryError.__init__(again, f"{where}: {self.rule}", found=self.found, remedy=self.remedy)
        return again


def attempt(work: Callable[[Any], None], shard: Any) -> WorkerFailure | None:
    """Do the work, and put into words what goes wrong."""
    try:
        work(shard)
    except LoraryError as error:
        return WorkerFailure(type(error), error.rule, error.found, error.remedy, traceback.format_exc())
    except Exception as error:  # whatever it is, the coordinator decides what follows from it
        return WorkerFailure(None, f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    return None


class Attempts:
    """How far the shards of a run have come. Whoever owns the workers takes shards from `queue` while any are `left`.

    Args:
        shards: in the order in which they shall be begun.
        say: called with lines of progress.
        debug: say tracebacks too.
    """

    def __init__(self, shards: Sequence[WorkItem], say: Callable[[str], None], *, debug: bool = False) -> None:
        self.shards, self.say, self.debug = shards, say, debug
        self.queue = deque(range(len(shards)))  # numbers of the shards that wait for a worker
        self.left = set(self.queue)  # numbers of the shards that are neither done nor given up
        self.tries: dict[int, int] = {}  # failed ones, by shard
        self.failed: dict[int, WorkerFailure] = {}  # shards given up, by number

    def finish(self, number: int, where: str) -> None:
        """A worker has finished a shard.

        Args:
            number: of the shard.
            where: the worker.
        """
        self.left.discard(number)
        done = len(self.shards) - len(self.left) - len(self.failed)
        self.say(f"{where} finished {_named(self.shards[number])}: {done} of {len(self.shards)} shards are done")

    def fail(self, number: int, failure: WorkerFailure, where: str) -> None:
        """A shard was not finished: it waits again where another try may help.

        Args:
            number: of the shard.
            failure: why.
            where: the worker; empty where the failure names it.
        """
        self.tries[number] = self.tries.get(number, 0) + 1
        is_final = failure.error is not None or self.tries[number] > RETRIES
        if is_final:
            self.failed[number] = failure
            self.left.discard(number)
        else:
            self.queue.append(number)
        follows = "given up; the others go on" if is_final else f"try {self.tries[number] + 1} of {RETRIES + 1} follows"
        reason = f"{where}: {failure.text}" if where else failure.text
        self.say(f"{reason}\n{_named(self.shards[number])}: {follows}")
        if self.debug and failure.trace:
            self.say(failure.trace)

    def raise_failed(self) -> None:
        """Raise the first failure of shards that were given up; the others were said when they happened.

        Raises:
            TrainError: if a shard failed `RETRIES` + 1 times.
            LoraryError: as the work raised it.
        """
        if not self.failed:
            return
        number, failure = min(self.failed.items())
        more = f" (1 of {len(self.failed)} shards that failed, see above)" if len(self.failed) > 1 else ""
        where = f"{_named(self.shards[number])}{more}"
        if failure.error is not None:
            raise failure.raised(where)
        rule = f"{where} must be trained within {RETRIES + 1} tries"
        raise TrainError(rule, found=failure.text, remedy=f"see why with --debug; {NEXT_RUN}")


def to_stderr(line: str) -> None:
    """Say a line of progress."""
    print(line, file=sys.stderr, flush=True)


def _named(shard: WorkItem) -> str:
    """Experts of a shard in words."""
    names = [f"'{name}'" for name in shard.names[:MAX_NAMES]]
    more = f" and {len(shard.names) - MAX_NAMES} more" if len(shard.names) > MAX_NAMES else ""
    return f"expert{'s' if len(shard.names) > 1 else ''} {', '.join(names)}{more}"
