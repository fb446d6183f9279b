"""An engine of several replicas: requests spread over them, those of a dead one move on, a new version rolls over.

Each replica is a process with a model of its own; a `Link` asks it. All of this runs in the event loop of the server.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from lorary.data.template import Ids
from lorary.errors import BusyError, EngineError, RequestTimeoutError
from lorary.evaluate.decisions import Decision
from lorary.route.setting import Routing
from lorary.serve.answering import AnswerStream
from lorary.serve.engine import Job, Load, Stream, Traced
from lorary.serve.replica import BEAT_S, Event, Facts
from lorary.serve.sizes import Sizes
from lorary.serve.versions import Versions, to_stderr

# Replicas that a request may lose before it is refused: it may be what kills them.
MOST_TRIES = 3
# Seconds that a replica may take to load its model, and that it may be silent.
START_S, SILENCE_S = 600.0, 12 * BEAT_S
# Seconds before a replica that failed to start is started again.
AGAIN_S, MOST_AGAIN_S = 1.0, 60.0
# Sessions whose replica is remembered.
MOST_SESSIONS = 10_000


class LostError(Exception):
    """A replica is gone, or does not answer."""


@runtime_checkable
class Link(Protocol):
    """Asks one replica the questions of `Replica.answer`; raises the errors that it answers with."""

    async def ask(self, question: str, *arguments: Any) -> Any:
        """Ask, and wait in the event loop.

        Raises:
            LostError: if the replica is gone.
        """
        ...

    def ask_now(self, question: str, *arguments: Any) -> Any:
        """Ask from any thread, and wait.

        Raises:
            LostError: if the replica is gone.
        """
        ...

    def end(self) -> None:
        """End the process; any number of times."""
        ...


@dataclass(eq=False)
class _Accepted:
    """A job that was accepted.

    Args:
        job: the job.
        number: counts the jobs.
        stream: where its tokens go.
        deadline: on the clock of `time.monotonic`; None for none.
        tries: replicas that it was given to.
        has_begun: whether a token has left; then no other replica can go on with it.
    """

    job: Job
    number: int
    stream: AnswerStream
    deadline: float | None
    tries: int = 0
    has_begun: bool = False


@dataclass(eq=False)
class _Place:
    """One of the replicas.

    Args:
        number: of it.
        link: asks it; None while another one is started.
        accepted: jobs that it was given, by number.
        is_changing: whether experts come and go there, so that what it is given now waits.
        num_given: jobs so far.
    """

    number: int
    link: Link | None = None
    accepted: dict[int, _Accepted] = field(default_factory=dict)
    is_changing: bool = False
    num_given: int = 0


class Replicas:
    """Makes answers with several replicas of one routed model; see `lorary.serve.engine.Engine`.

    A job goes to the replica that has the fewest; those of one session stay with theirs. When a replica dies, its jobs
    without a token are given to others, the rest fail, and another replica is started in its place. Experts come and
    go replica by replica, so that the others answer meanwhile.

    Args:
        launch: starts a replica.
        links: the first ones, started.
        sizes: of each replica's engine; `capacity` is that of all of them together.
        stamps: the library's adapters as of now: `Library.stamps`.
        say: is told what happens to replicas; stderr where None.

    Attributes:
        versions: of the adapters; it follows what other commands change in the library.
    """

    def __init__(
        self,
        launch: Callable[[], Link],
        links: Sequence[Link],
        sizes: Sizes,
        stamps: Callable[[], Mapping[str, object]],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._launch, self._sizes, self._say = launch, sizes, say or to_stderr
        self.versions = Versions(stamps(), stamps, self._roll, self._say)
        self._places = [_Place(number, link) for number, link in enumerate(links, 1)]
        self._jobs: dict[int, _Accepted] = {}
        self._queue: list[_Accepted] = []
        self._sessions: OrderedDict[str, _Place] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_submitted = 0
        self._is_started = self._is_closed = False
        self._start_error: Exception | None = None
        self._news = asyncio.Event()

    def look(self) -> Facts:
        """Have all replicas load, before the event loop runs, and say what the first one has found.

        Raises:
            LoraryError: as a replica refuses to start.
            EngineError: if one dies, or takes too long.
        """
        links = [place.link for place in self._places if place.link is not None]
        try:
            with ThreadPoolExecutor(len(links)) as pool:
                try:
                    facts: list[Facts] = list(pool.map(lambda link: link.ask_now("load"), links))
                except BaseException:  # an interruption, too: the threads would wait for the others to load
                    self._end_all()
                    raise
        except LostError as error:
            raise _not_started(error) from None
        return facts[0]

    async def start(self) -> None:
        """Begin to take jobs; all replicas have loaded (`look`)."""
        for place in self._places:
            self._begin(self._listen(place, place.link))
        self._begin(self.versions.watch())
        self._is_started = True

    async def stop(self, *, drain: float) -> None:
        """Take no more jobs, finish those that were accepted for at most `drain` seconds, break off the rest."""
        self._is_closed = True
        self._news.set()
        end = time.monotonic() + drain
        while self._jobs and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for accepted in list(self._jobs.values()):
            self._end(accepted, EngineError("the engine has stopped", found="the answer was not complete"))
        self._end_all()

    def submit(self, job: Job) -> Stream:
        """Accept a job. What a replica refuses it for is raised by its stream.

        Raises:
            BusyError: if as many jobs are accepted as the engine holds.
            EngineError: if it was not started, stops, or no replica can be started.
        """
        self._check_open()
        if len(self._jobs) >= self._sizes.capacity:
            raise BusyError(
                f"the engine holds {self._sizes.capacity} requests",
                found="all places are taken",
                remedy="ask again later",
            )
        self._num_submitted += 1
        number = self._num_submitted
        stream = AnswerStream(partial(self._cancel, number))
        deadline = None if job.timeout is None else time.monotonic() + job.timeout
        accepted = self._jobs[number] = _Accepted(job, number, stream, deadline)
        self._give(accepted)
        return stream

    async def decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        """Let a rule that decides for whole requests decide for each prompt, in the least loaded replica."""
        decisions: list[Decision] = await self._ask_any("decide", setting, prompts)
        return decisions

    async def trace(self, setting: Routing, ids: Ids) -> Traced:
        """Run one pass over a text in the least loaded replica, and record how each of its tokens is routed."""
        traced: Traced = await self._ask_any("trace", setting, ids)
        return traced

    def check(self, setting: Routing) -> None:
        """Refuse a setting that cannot be used over the experts that are seated; asks a replica, and waits.

        Raises:
            EngineError: if no replica answers.
            RouterError: if it cannot.
            UsageError: if it names layers that are not routed.
        """
        for link in [place.link for place in self._places if place.link is not None]:
            with suppress(LostError):  # who listens to it notices, too
                link.ask_now("check", setting)
                return
        raise _no_replica(self._start_error)

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken, and a replica answers them."""
        return self._is_started and not self._is_closed and self._least_loaded() is not None

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that every replica holds, sorted."""
        return self.versions.names

    async def seat(self, name: str) -> None:
        """Seat the library's adapter of a name in every replica, one after the other.

        Raises:
            LoraryError: if the first one cannot seat it; nothing has changed then.
        """
        self._check_open()
        await self.versions.seat(name)

    async def unseat(self, name: str) -> None:
        """Take an expert out of every replica, one after the other.

        Raises:
            LoraryError: if it must stay; nothing has changed then.
        """
        self._check_open()
        await self.versions.unseat(name)

    def load(self) -> Load:
        """How busy the replicas are together."""
        running = sum(min(len(place.accepted), self._sizes.rows) for place in self._places)
        return Load(len(self._jobs) - running, running, self._sizes.capacity)

    # Jobs.

    def _check_open(self) -> None:
        if not self._is_started or self._is_closed:
            raise EngineError("the engine takes no requests", found="it stops" if self._is_closed else "not started")
        if self._start_error is not None and self._least_loaded() is None:
            raise _no_replica(self._start_error)

    def _least_loaded(self, session: str | None = None) -> _Place | None:
        """The replica for a job; one that changes only where no other lives."""
        living = [place for place in self._places if place.link is not None]
        steady = [place for place in living if not place.is_changing] or living
        if not steady:
            return None
        known = None if session is None else self._sessions.get(session)
        place = known if known in steady else min(steady, key=lambda place: (len(place.accepted), place.num_given))
        if session is not None and place is not None:
            self._sessions[session] = place
            self._sessions.move_to_end(session)
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return place

    def _give(self, accepted: _Accepted) -> None:
        """Give a job to a replica, or let it wait for one."""
        place = self._least_loaded(accepted.job.session)
        if place is None:
            self._queue.append(accepted)
            return
        job = accepted.job
        if accepted.deadline is not None:
            job = replace(job, timeout=accepted.deadline - time.monotonic())
            if job.timeout is not None and job.timeout <= 0:
                rule = "an answer must be made in time"
                return self._end(accepted, RequestTimeoutError(rule, found="no replica was free to begin it"))
        accepted.tries += 1
        place.num_given += 1
        place.accepted[accepted.number] = accepted
        self._begin(self._send(accepted, job, place, place.link))

    async def _send(self, accepted: _Accepted, job: Job, place: _Place, link: Link | None) -> None:
        assert link is not None
        try:
            await link.ask("submit", accepted.number, job)
        except LostError as error:
            self._lose(place, link, error)
        except Exception as error:  # it refuses the job
            self._deliver(place, accepted.number, error)
        else:
            if accepted.stream.is_over:  # it was cancelled meanwhile
                with suppress(LostError):
                    await link.ask("cancel", accepted.number)

    def _cancel(self, number: int) -> None:
        accepted = self._jobs.pop(number, None)
        if accepted is None:
            return
        for place in self._places:
            if place.accepted.pop(number, None) is not None and place.link is not None:
                self._begin(self._tell_cancel(place.link, number))
        if accepted in self._queue:
            self._queue.remove(accepted)

    async def _tell_cancel(self, link: Link, number: int) -> None:
        with suppress(LostError):  # who listens to it notices, too
            await link.ask("cancel", number)

    def _deliver(self, place: _Place, number: int, event: Event) -> None:
        accepted = place.accepted.get(number)
        if accepted is None:  # it was cancelled
            return
        if isinstance(event, Exception):
            self._end(accepted, event)
        elif isinstance(event, tuple):
            accepted.stream.begin(event)
        else:
            accepted.has_begun = True
            accepted.stream.put(event)
        if accepted.stream.is_over:
            place.accepted.pop(number, None)
            self._jobs.pop(number, None)

    def _end(self, accepted: _Accepted, error: Exception) -> None:
        self._jobs.pop(accepted.number, None)
        accepted.stream.end(error)

    async def _ask_any(self, question: str, *arguments: Any) -> Any:
        """Ask the least loaded replica, and another one where it dies: nothing is lost by asking twice."""
        for _ in range(MOST_TRIES):
            self._check_open()
            while (place := self._least_loaded()) is None or (link := place.link) is None:
                self._news.clear()
                await self._news.wait()
                self._check_open()
            try:
                return await link.ask(question, *arguments)
            except LostError as error:
                self._lose(place, link, error)
        raise _no_replica(self._start_error)

    # Lives of replicas.

    async def _listen(self, place: _Place, link: Link | None) -> None:
        """Take the tokens of a replica until it is gone."""
        assert link is not None
        try:
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        events = await link.ask("next")
                except TimeoutError:
                    raise LostError(f"was silent for {SILENCE_S:.0f} s") from None
                for number, event in events:
                    self._deliver(place, number, event)
        except Exception as error:  # without its tokens it is of no use
            self._lose(place, link, error)

    def _lose(self, place: _Place, link: Link, reason: Exception) -> None:
        """A replica is gone: its jobs move on or fail, and another one is started in its place. Once for each."""
        if place.link is not link:
            return
        place.link = None
        link.end()
        orphans, place.accepted = list(place.accepted.values()), {}
        self._say(f"replica {place.number} is gone with {len(orphans)} requests: {reason}")
        for accepted in orphans:
            if accepted.has_begun or accepted.tries >= MOST_TRIES:
                lost = EngineError(
                    "the replica that makes an answer must live until it is complete",
                    found="it is gone" if accepted.has_begun else f"{accepted.tries} replicas are gone",
                    remedy="ask again",
                )
                self._end(accepted, lost)
            else:
                self._give(accepted)
        if not self._is_closed:
            self._begin(self._start_again(place))

    async def _start_again(self, place: _Place) -> None:
        wait = AGAIN_S
        while True:
            link = self._launch()
            try:
                # Under the lock, or it could miss a change that the others go through.
                async with self.versions.lock:
                    facts = await _loaded(link)
                    self._start_error, place.link, place.is_changing = None, link, False
                    self._say(f"replica {place.number} is ready")
                    self._begin(self._listen(place, link))
                    self._news.set()
                    if facts.experts != self.experts:  # the library has changed, and nobody has noticed yet
                        await self.versions.follow()
                break
            except asyncio.CancelledError:
                link.end()
                raise
            except Exception as error:
                link.end()
                self._start_error = error
                self._news.set()
                self._say(f"replica {place.number} does not start: {error}; tried again in {wait:.0f} s")
                if self._least_loaded() is None:
                    waiting, self._queue = self._queue, []
                    for accepted in waiting:
                        self._end(accepted, _no_replica(error))
            await asyncio.sleep(wait)
            wait = min(2 * wait, MOST_AGAIN_S)
        waiting, self._queue = self._queue, []
        for accepted in waiting:
            self._give(accepted)

    def _end_all(self) -> None:
        for place in self._places:
            if place.link is not None:
                place.link.end()
                place.link = None

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _roll(self, removed: Sequence[str], seated: Sequence[str]) -> Mapping[str, Exception]:
        """Change the experts replica by replica; what the first one refuses, the others are not asked for.

        Returns:
            What was refused, with the reasons.
        """
        refused: dict[str, Exception] = {}
        has_changed = False
        for place in self._places:
            if (link := place.link) is None:
                continue  # another one is started there, from the library as it is
            place.is_changing = True
            try:
                names = [[name for name in group if name not in refused] for group in (removed, seated)]
                failed = await link.ask("change", *names)
            except LostError as error:
                self._lose(place, link, error)
                continue
            finally:
                place.is_changing = False
            if not has_changed:
                refused.update(failed)
            elif failed:  # it is not what the others are
                self._lose(place, link, LostError(f"did not follow: {next(iter(failed.values()))}"))
            has_changed = True
        return refused


async def _loaded(link: Link) -> Facts:
    try:
        async with asyncio.timeout(START_S):
            facts: Facts = await link.ask("load")
            return facts
    except TimeoutError:
        raise EngineError("a replica must start", found=f"it has not after {START_S:.0f} s") from None
    except LostError as error:
        raise _not_started(error) from None


def _not_started(error: LostError) -> EngineError:
    return EngineError("a replica must start", found=error, remedy="start fewer --replicas where memory is short")


def _no_replica(error: Exception | None) -> EngineError:
    found = "all are gone, and others are being started" if error is None else "none can be started"
    return EngineError("a replica must live to answer", found=found, remedy="ask again later")
