"""Which Ray worker works on which shard: seats, a queue, and what follows when a worker or its work fails."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import TrainError
from lorary.train.attempts import NEXT_RUN, RETRIES, Attempts, WorkerFailure
from lorary.train.executor import WorkItem
from lorary.train.ray_cluster import Cluster, cause_of, lost
from lorary.train.ray_worker import Worker, site_of

LOOK_EVERY_S = 1.0  # how often workers are asked for their lines
# A worker that leaves this question unanswered hangs: one that computes answers, from another thread.
SILENCE_S = 300.0
FAREWELL_S = 3.0  # for workers to end themselves where Ray may be gone


@dataclass(eq=False)
class Seat:
    """A worker as the coordinator sees it.

    Args:
        label: its number, for lines of progress.
        actor: Ray's handle.
        pending: Ray's reference for each question ('hello', 'run', 'lines') that it has not answered.
        place: machine and process, once it has said so.
        shard: number of the shard it works on.
        asked_at: when it was last asked for lines.
    """

    label: int
    actor: Any
    pending: dict[str, Any]
    place: str | None = None
    shard: int | None = None
    asked_at: float = 0.0

    def __str__(self) -> str:
        return f"worker {self.label} ({self.place or 'starting'})"


@dataclass
class WorkerPool:
    """The workers of one run.

    Args:
        cluster: where.
        number: of workers.
        needs: CPU, GPU and other resources of each.
        say: called with lines of progress.
        start_timeout_s: seconds without any worker at work after which the run is given up.
        debug: say tracebacks too.
    """

    cluster: Cluster
    number: int
    needs: dict[str, float]
    say: Callable[[str], None]
    start_timeout_s: float
    debug: bool = False
    work: Callable[[Any], None] = field(init=False)
    attempts: Attempts = field(init=False)
    seats: list[Seat] = field(default_factory=list)
    _num_seated: int = 0
    _failed_starts: int = 0  # since the last worker that did start
    _last_start: str = ""
    _busy_at: float = 0.0

    def run(self, work: Callable[[Any], None], shards: Sequence[WorkItem]) -> None:
        """Work on all shards.

        Raises:
            TrainError: if the cluster is lost, no worker starts, or a shard failed `RETRIES` + 1 times.
            LoraryError: as the work raised it.
        """
        self.work, self.attempts = work, Attempts(shards, self.say, debug=self.debug)
        self._busy_at = time.monotonic()
        try:
            while self.attempts.left:
                self.cluster.head.check()
                self._fill_seats()
                self._give_out()
                self._check_progress()
                self._look()
        except ConnectionError as error:  # what Ray Client raises
            raise lost(str(error)[:300]) from error
        finally:
            self._dismiss_all()
        self.attempts.raise_failed()

    def _fill_seats(self) -> None:
        """Have as many workers as are of use, but do not go on for ever where they fail to start."""
        cpus, gpus = self.needs.get("CPU", 1.0), self.needs.get("GPU", 0.0)
        resources = {name: amount for name, amount in self.needs.items() if name not in ("CPU", "GPU")}
        kind = self.cluster.ray.remote(num_cpus=cpus, num_gpus=gpus, resources=resources, max_concurrency=2)(Worker)
        while (
            len(self.seats) < min(self.number, len(self.attempts.left)) and self._failed_starts < RETRIES + self.number
        ):
            actor = kind.remote(max(1, int(cpus)))
            hello = actor.hello.remote(site_of(self.attempts.shards[0].library))
            self._num_seated += 1
            self.seats.append(Seat(self._num_seated, actor, {"hello": hello}))

    def _give_out(self) -> None:
        """Give waiting shards to idle workers; ask busy ones for news."""
        for seat in self.seats:
            if seat.place is None:
                continue
            if seat.shard is None and self.attempts.queue:
                seat.shard = self.attempts.queue.popleft()
                seat.pending["run"] = seat.actor.run.remote(self.work, self.attempts.shards[seat.shard])
            if seat.shard is not None and "lines" not in seat.pending:
                seat.pending["lines"], seat.asked_at = seat.actor.take_lines.remote(), time.monotonic()

    def _check_progress(self) -> None:
        """Never wait for ever: neither for a worker to start, nor for one that hangs."""
        now = time.monotonic()
        if any(seat.shard is not None for seat in self.seats):
            self._busy_at = now
        elif not self.seats or now - self._busy_at > self.start_timeout_s:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self.needs.items() if amount)
            waited = f"none after {now - self._busy_at:.0f} s; each needs {needs}, machines have {self._resources()}"
            raise TrainError(
                "a Ray worker must start", found=self._last_start or waited,
                remedy=f"mend that, or ask for other --workers; {NEXT_RUN}",
            )  # fmt: skip
        for seat in list(self.seats):
            if "lines" in seat.pending and now - seat.asked_at > SILENCE_S:
                self.cluster.ray.kill(seat.actor)
                self._lose(seat, f"was silent for {SILENCE_S:.0f} s")

    def _resources(self) -> str:
        return "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in self.cluster.nodes[:8])

    def _look(self) -> None:
        """Wait a moment for answers, and take those that are there."""
        refs = [ref for seat in self.seats for ref in seat.pending.values()]
        done = set(self.cluster.ray.wait(refs, num_returns=len(refs), timeout=LOOK_EVERY_S)[0])
        for seat in list(self.seats):
            # In this order by chance of the alphabet: what a run says comes before its end.
            for question in sorted(question for question, ref in seat.pending.items() if ref in done):
                if seat in self.seats:
                    self._take(seat, question, seat.pending.pop(question))

    def _take(self, seat: Seat, question: str, ref: Any) -> None:
        """Take an answer of a worker, or find that it is gone."""
        errors = self.cluster.ray.exceptions
        try:
            answer = self.cluster.ray.get(ref)
        except errors.RayActorError as error:
            return self._lose(seat, f"is gone: {cause_of(error)}")
        except errors.RayError as error:  # the call itself failed: what was sent cannot be unpickled there
            answer = (WorkerFailure(None, cause_of(error), trace=str(error)), None if question == "hello" else [])
        if question == "hello":
            self._seat(seat, *answer)
        elif question == "run":
            self._settle(seat, *answer)
        else:
            self._say_lines(seat, answer)

    def _seat(self, seat: Seat, failure: WorkerFailure | None, place: str | None) -> None:
        """A worker has started, or cannot be used."""
        seat.place = place
        if failure is None:
            self._failed_starts = 0
            self.say(f"{seat} is ready")
        else:
            self._lose(seat, f"cannot be used: {failure.text}")

    def _settle(self, seat: Seat, failure: WorkerFailure | None, lines: Sequence[str]) -> None:
        """A worker has come to the end of its shard."""
        self._say_lines(seat, lines)
        assert seat.shard is not None
        number, seat.shard = seat.shard, None
        if failure is None:
            self.attempts.finish(number, str(seat))
        else:
            self.attempts.fail(number, failure, str(seat))

    def _lose(self, seat: Seat, why: str) -> None:
        """A worker is of no more use: what it worked on goes to another."""
        self.seats.remove(seat)
        if seat.shard is not None:
            return self.attempts.fail(seat.shard, WorkerFailure(None, f"{seat} {why}"), "")
        self._failed_starts, self._last_start = self._failed_starts + 1, f"{seat} {why}"
        self.say(self._last_start)

    def _say_lines(self, seat: Seat, lines: Sequence[str]) -> None:
        for line in lines:
            self.say(f"worker {seat.label}: {line}")

    def _dismiss_all(self) -> None:
        """Send all workers away. Those still at work end themselves, since Ray may be past ending them."""
        stopping = [seat.actor.stop.remote() for seat in self.seats if seat.shard is not None]
        self.seats.clear()  # Ray ends a worker that nobody holds
        if stopping:
            self.cluster.ray.wait(stopping, num_returns=len(stopping), timeout=FAREWELL_S)
