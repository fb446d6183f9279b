"""Shards on Ray workers: each loads the base once and takes shards from a queue; a dead worker's go to another."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout

from lorary.numbers import check_count
from lorary.train.attempts import to_stderr
from lorary.train.executor import S
from lorary.train.ray_cluster import connected, plan_workers
from lorary.train.ray_schedule import WorkerPool


class RayExecutor:
    """Runs shards on the workers of a Ray cluster.

    A shard that Lorary itself refuses (bad data, a base that does not fit) is reported at once and not tried again;
    one that fails otherwise, or whose worker dies, is tried again on the next free worker. The other shards are
    finished in either case, and the error is raised at the end: a rerun has only the failed ones left to do.

    Args:
        address: 'auto', 'HOST:PORT' or 'ray://HOST:PORT'; where None, the cluster in RAY_ADDRESS, or else one that
            is started on this machine and ends with the run.
        workers: how many; where None, one per GPU, or per machine where there is none.
        resources: CPU and GPU (fractions allowed) of each worker; where None, as `plan_workers` divides the cluster.
        say: called with lines of progress; where None they go to stderr.
        start_timeout_s: seconds that the first worker may take to start, and later ones after the last has died.
        head_timeout_s: seconds without an answer after which the head counts as lost; Ray's own limit is 60.
        debug: show Ray's log, and the traceback of every failure.

    Raises:
        UsageError: if there shall be fewer than one worker.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        *,
        resources: Mapping[str, float] | None = None,
        say: Callable[[str], None] | None = None,
        start_timeout_s: float = 600.0,
        head_timeout_s: float = 20.0,
        debug: bool = False,
    ) -> None:
        if workers is not None:
            check_count("--workers", workers)
        self.address, self.workers, self.resources, self.debug = address, workers, resources, debug
        self.start_timeout_s, self.head_timeout_s = start_timeout_s, head_timeout_s
        self._say = say or to_stderr

    def run(self, work: Callable[[S], None], shards: Sequence[S]) -> None:
        """As `Executor.run`.

        Raises:
            MissingExtraError: if Ray is not installed.
            TrainError: if there is no cluster, it is lost, no worker starts, or a shard failed `RETRIES` + 1 times.
            LoraryError: as the work raised it.
        """
        if not shards:
            return
        with (
            ray_kept_quiet(self.debug),
            connected(self.address, self.workers, head_timeout_s=self.head_timeout_s, debug=self.debug) as cluster,
        ):
            number, needs = plan_workers(cluster.nodes, self.workers)
            pool = WorkerPool(
                cluster, number, dict(self.resources or needs), self._say, self.start_timeout_s, self.debug
            )
            pool.run(work, shards)


@contextmanager
def ray_kept_quiet(debug: bool) -> Iterator[None]:
    """Keep what Ray prints about dead workers off stdout, where a command prints its result."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stderr if debug else nowhere):
        yield
