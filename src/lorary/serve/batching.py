"""The engine over one routed model: requests of any setting, length and age share its passes.

A thread runs the passes. Between two of them it looks for requests that came, were broken off or have no time left. It
lets routers decide, and changes experts.
"""

import asyncio
import concurrent.futures
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from lorary.data.template import Ids
from lorary.errors import BusyError, EngineError, UsageError
from lorary.evaluate.completion import check_context
from lorary.evaluate.decisions import Decision
from lorary.model.apply import apply_routing
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.features import decoder_of
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.row_routing import RowRouting, check_decided
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.model.vocabulary import embedded_tokens
from lorary.route.setting import Routing
from lorary.serve.answering import AnswerStream, Request
from lorary.serve.deciding import Asked, Deciding
from lorary.serve.decoder import Decoder, Event
from lorary.serve.engine import Job, Load, Stream, Traced
from lorary.serve.prefixes import PrefixCache, contents
from lorary.serve.sizes import Sizes
from lorary.serve.trial import check_serves

T = TypeVar("T")
# Settings of which it is kept whether they can be used.
_MOST_CHECKED = 1000


class RoutedEngine:
    """Makes answers with a routed model; see `lorary.serve.engine.Engine`.

    The model is the engine's between `start` and `stop`: nobody else computes with it or changes it. Tokens are those
    of `lorary generate`, whatever else is answered at the time.

    Args:
        base: the model, with experts seated in it (`lorary.attach`), and its tokenizer.
        sizes: how much at once.
    """

    def __init__(self, base: Base, sizes: Sizes | None = None) -> None:
        seating(base.model)
        self.base, self.sizes = base, sizes or Sizes()
        self.prefixes = PrefixCache(self.sizes.prefix_tokens)
        self._news = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._asked: deque[Asked] = deque()
        self._calls: deque[_Call] = deque()
        self._changes: deque[_Call] = deque()
        self._checked: dict[str, Exception | None] = {}
        self._events: list[tuple[Request, Event]] = []
        self._num_accepted = self._num_submitted = 0
        self._decoder: Decoder | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = self._is_ending = False
        self._failure: BaseException | None = None
        self._gone: EngineError | None = None
        self._num_threads = torch.get_num_threads()

    # What the event loop calls.

    async def start(self) -> None:
        """Begin to take jobs.

        Raises:
            BaseModelError: if rows of this model cannot share a batch that changes; see `check_serves`.
            EngineError: if it was started before.
        """
        if self._thread is not None:
            raise EngineError("an engine can be started once", remedy="make another RoutedEngine")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="lorary-engine", daemon=True)
        self._thread.start()
        try:
            await self.call(_try_rows)
        except BaseException:
            await self.stop(drain=0)
            raise

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken."""
        return self._why_not() is None

    async def stop(self, *, drain: float) -> None:
        """Take no more jobs, finish those that were accepted for at most `drain` seconds, break off the rest."""
        self._is_closed = True
        thread = self._thread
        if thread is None:
            return
        end = asyncio.get_running_loop().time() + drain
        while self._num_accepted and thread.is_alive() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        with self._news:
            self._is_ending = True
            self._news.notify()
        while thread.is_alive():  # one pass more at most
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)  # what the thread said last

    def submit(self, job: Job) -> Stream:
        """Accept a job.

        Raises:
            BusyError: if as many jobs are accepted as the engine holds.
            EngineError: if it was not started, stops, or has failed.
            UsageError: if prompt and answer do not fit the base's context, a token is none of the base's, or the
                setting has still to decide for its request.
        """
        self._check_open(self._num_accepted)
        check_decided(job.setting)
        self._check_ids(job.ids)
        check_context(self.base, len(job.ids), job.max_new_tokens)
        if job.max_new_tokens < 0 or (not job.max_new_tokens and not job.prompt_logprobs):
            raise UsageError("an answer must have a token at least", found=job.max_new_tokens)
        request = Request.of(job, self._num_submitted, self._cancel)
        self._post(self._waiting, request)
        self._num_submitted += 1
        self._num_accepted += 1
        return request.stream

    async def decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        """Let a rule that decides for whole requests decide for each prompt, by a pass of the base or a part of it.

        Prompts of several calls that ask the same are read together.

        Raises:
            BusyError: if as many calls wait as the engine holds.
            EngineError: if it was not started, stops, or has failed.
            RouterError: if the setting cannot be used over the experts.
            UsageError: if the setting does not decide for whole requests, or a prompt does not fit the base.
        """
        if setting.decides != "request":
            raise UsageError("only a router that decides for whole requests can be asked", found=setting.router)
        self._check_open(len(self._asked))
        for ids in prompts:
            self._check_ids(ids)
            check_context(self.base, len(ids), 0)
        assert self._loop is not None
        asked = Asked(setting, [tuple(ids) for ids in prompts], self._loop.create_future())
        self._post(self._asked, asked)
        decisions: list[Decision] = await asked.answer
        return decisions

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that are seated, sorted."""
        return seating(self.base.model).experts

    def check(self, setting: Routing) -> None:
        """Refuse a setting that cannot be used over the experts that are seated; waits for a pass the first time.

        Raises:
            EngineError: if the engine has failed.
            RouterError: if it cannot.
            UsageError: if it names layers that are not routed.
        """
        key = json.dumps(setting.to_json(), sort_keys=True)
        checked = self._checked  # a change of the experts puts another one in its place
        if key in checked:
            known = checked[key]
        else:
            asked: concurrent.futures.Future[None] = concurrent.futures.Future()
            call = _Call(partial(_try, setting), asked, 0)
            if self._thread is not None and self._thread.is_alive():
                self._post(self._calls, call)
            else:
                call.run(self.base.model)
            error = asked.exception()
            known = error if isinstance(error, Exception) else None
            if not isinstance(known, EngineError):
                if len(checked) >= _MOST_CHECKED:
                    checked.clear()
                checked[key] = known
        if known is not None:
            raise known.with_traceback(None)

    async def trace(self, setting: Routing, ids: Ids) -> Traced:
        """Run one pass over a text, and record how each of its tokens is routed.

        Raises:
            EngineError: if the engine was not started, stops, or has failed.
            RouterError: if the setting cannot be used over the experts.
            UsageError: if the text does not fit the base.
        """
        self._check_ids(ids)
        check_context(self.base, len(ids), 0)
        return await self.call(partial(_traced, setting, ids))

    async def call(self, work: Callable[[Any], T]) -> T:
        """Run a function with the model in the engine's thread, between two passes; the answers stand still meanwhile.

        Args:
            work: is given the model. It may enter `lorary.routing` and `lorary.trace` blocks, and changes no expert.
        """
        return await self._put(self._calls, work)

    async def change(self, change: Callable[[Any], T]) -> T:
        """Add, remove or replace experts.

        Requests that were accepted before are answered by the experts that they found. Those that are accepted later
        wait for these and for the change. One that names an expert which is gone then fails with a `RouterError`.

        Args:
            change: is given the model, for `lorary.add_expert`, `lorary.remove_expert`, `lorary.replace_expert`. The
                engine goes on where it fails, and its error is raised here.
        """
        return await self._put(self._changes, change)

    async def seat(self, name: str) -> None:
        """Seat the library's adapter of a name, in the place of the expert of that name where there is one.

        Requests that were accepted before are answered without it, those that are accepted later, with it.

        Raises:
            LoraryError: if it cannot be seated; nothing has changed then.
        """
        await self.change(partial(_seat, name))

    async def unseat(self, name: str) -> None:
        """Take an expert out. Requests that were accepted before are still answered with it.

        Raises:
            LoraryError: if it must stay; nothing has changed then.
        """
        await self.change(partial(remove_expert, name=name))

    def load(self) -> Load:
        """How busy the engine is now."""
        waiting = sum(not request.is_over for request in tuple(self._waiting))
        return Load(waiting, max(self._num_accepted - waiting, 0), self.sizes.capacity)

    async def _put(self, calls: "deque[_Call]", work: Callable[[Any], T]) -> T:
        if (reason := self._why_not()) is not None:
            raise reason
        assert self._loop is not None
        future: asyncio.Future[T] = self._loop.create_future()
        self._post(calls, _Call(work, future, self._num_submitted, self._loop))
        return await future

    def _post(self, queue: "deque[Any]", item: Any) -> None:
        with self._news:
            if self._gone is not None:
                raise self._gone
            queue.append(item)
            self._news.notify()

    def _why_not(self) -> EngineError | None:
        if self._failure is not None:
            return _failed(self._failure)
        if self._thread is None or not self._thread.is_alive():
            return EngineError("the engine must run to take requests", found="it was not started, or has ended")
        return EngineError("the engine takes no more requests", found="it stops") if self._is_closed else None

    def _check_open(self, num: int) -> None:
        if (reason := self._why_not()) is not None:
            raise reason
        if num >= self.sizes.capacity:
            raise BusyError(
                f"the engine holds {self.sizes.capacity} requests",
                found="all places are taken",
                remedy="ask again later",
            )

    def _check_ids(self, ids: Ids) -> None:
        num_tokens = embedded_tokens(self.base.model)
        if not ids or min(ids) < 0 or max(ids) >= num_tokens:
            raise UsageError(
                f"a prompt must have tokens, each with an id from 0 to {num_tokens - 1}",
                found=f"ids from {min(ids)} to {max(ids)}" if ids else "none",
            )

    def _cancel(self, request: Request) -> None:
        if not request.stream.is_over:
            request.is_over = True
            self._num_accepted -= 1
            with self._news:
                self._news.notify()

    # What the thread does.

    def _run(self) -> None:
        error: BaseException | None = None
        model, state = self.base.model, seating(self.base.model)
        before = state.default.routing
        try:
            torch.set_num_threads(self._num_threads)  # a new thread has a number of its own
            # Each request brings its setting; one in force could keep experts from coming that lack its data.
            apply_routing(model, state, Routing("base"))
            with torch.no_grad():
                while not self._is_ending:
                    self._serve()
                    self._change()
            apply_routing(model, state, before)
        except BaseException as failure:  # whatever it is, nobody may wait for it
            error = self._failure = failure
        self._break_off(error)

    def _serve(self) -> None:
        """Answer until an expert is to change, or the engine ends."""
        hashes = contents(seating(self.base.model))
        with RowRouting(self.base.model) as routing, Deciding(self.base.model) as deciding:
            decoder = self._decoder = Decoder(
                self.base, routing, self.prefixes, hashes=hashes, sizes=self.sizes, emit=self._emit
            )
            while not self._is_ending:
                self._wait(decoder)
                decoder.sweep(self._waiting)
                while self._calls:
                    self._calls.popleft().run(self.base.model)
                before = self._changes[0].number if self._changes else None
                decoder.admit(self._waiting, before)
                is_due = before is not None and not decoder.requests
                if not is_due:
                    deciding.step(self._asked, self.sizes.chunk, self._answer)
                    decoder.step()
                self._hand_out()
                if is_due:
                    return

    def _wait(self, decoder: Decoder) -> None:
        queues = (self._asked, self._calls, self._changes, self._waiting)
        with self._news:
            while not (self._is_ending or any(queues) or decoder.requests):
                self._news.wait()

    def _change(self) -> None:
        """Change experts, while no block is open."""
        if self._changes and not self._is_ending:
            self._checked = {}
            self.prefixes.clear()  # what was prepared may change with the experts, and no digest holds it
            self._changes.popleft().run(self.base.model)

    def _answer(self, future: asyncio.Future[Any], result: Any) -> None:
        """Give the event loop a result, or an error to raise."""
        self._tell(_settle, future, result)

    def _emit(self, request: Request, event: Event) -> None:
        self._events.append((request, event))

    def _hand_out(self) -> None:
        """Give the event loop what a step brought, at once."""
        if self._events:
            events, self._events = self._events, []
            self._tell(self._deliver, events)

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody listens
            self._is_ending = True

    def _deliver(self, events: Sequence[tuple[Request, Event]]) -> None:
        """In the event loop: hand events to their streams."""
        for request, event in events:
            stream: AnswerStream = request.stream
            if stream.is_over:
                continue
            if isinstance(event, list):
                stream.begin(event)
            elif event is None or isinstance(event, Exception):
                stream.end(event)
            else:
                stream.put(event)
            self._num_accepted -= stream.is_over

    def _break_off(self, failure: BaseException | None) -> None:
        """End whatever has not ended."""
        error = EngineError("the engine has stopped", found="the answer was not complete")
        error = error if failure is None else _failed(failure)
        with self._news:
            self._gone = error
        reading = [] if self._decoder is None else self._decoder.requests
        self._decoder = None
        self.prefixes.clear()
        for request in (*reading, *self._waiting):
            if not request.is_over:
                request.is_over = True
                self._emit(request, error)
        self._waiting.clear()
        self._hand_out()
        for asked in self._asked:
            self._answer(asked.answer, error)
        for call in (*self._calls, *self._changes):
            call.settle(error)
        for queue in (self._asked, self._calls, self._changes):
            queue.clear()


@dataclass(eq=False)
class _Call:
    """Something to do between two passes.

    Args:
        work: is given the model.
        future: gets its result; settled in the event loop where there is one.
        number: of requests that were accepted before.
        loop: of the future; None where a thread waits for it.
    """

    work: Callable[[Any], Any]
    future: Any
    number: int
    loop: asyncio.AbstractEventLoop | None = None

    def run(self, model: Any) -> None:
        """Do it."""
        if self.future.cancelled():
            return
        try:
            result = self.work(model)
        except Exception as error:
            result = error
        self.settle(result)

    def settle(self, result: Any) -> None:
        """Hand out the result, or an error to raise."""
        if self.loop is None:
            _settle(self.future, result)
        else:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                self.loop.call_soon_threadsafe(_settle, self.future, result)


def _try(setting: Routing, model: Any) -> None:
    with routing(model, setting):
        pass


def _try_rows(model: Any) -> None:
    with routing(model, Routing("base")):
        check_serves(model)


def _traced(setting: Routing, ids: Ids, model: Any) -> Traced:
    with routing(model, setting), trace(model) as traced:
        decoder_of(model)(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    if not traced.layers:
        return Traced(traced.experts, (), torch.zeros(0, len(ids), len(traced.experts)))
    return Traced(traced.experts, tuple(traced.layers), traced.stacked()[:, 0])


def _seat(name: str, model: Any) -> None:
    state = seating(model)
    put = replace_expert if name in state.experts else add_expert
    put(model, state.library.get(name), name)
    state.live.pop(name, None)  # it is the library's own, and so is what was prepared for it


def _settle(future: Any, result: Any) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _failed(failure: BaseException) -> EngineError:
    return EngineError(
        "the engine's thread must live to serve", found=f"{type(failure).__name__}: {failure}",
        remedy="start the server again, and report what it wrote",
    )  # fmt: skip
