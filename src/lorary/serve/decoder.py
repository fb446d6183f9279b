"""The passes of the engine: prompts in chunks, then one token for every row that is answered."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorary.errors import BaseModelError, LoraryError, RequestTimeoutError
from lorary.evaluate.generation import left_pad, stop_ids
from lorary.model.base import Base
from lorary.model.finite import cause_of
from lorary.model.positions import text_config
from lorary.model.row_routing import Kind, RowRouting
from lorary.serve.answering import Request
from lorary.serve.engine import Token
from lorary.serve.next_token import log_probabilities, next_tokens
from lorary.serve.prefixes import PrefixCache, computed_by
from lorary.serve.row_cache import RowCache
from lorary.serve.row_pass import row_pass
from lorary.serve.sizes import Sizes

# What becomes of a request: the prompt's tokens, a token, an error, or None where it ends without any of these.
Event = list[Token] | Token | Exception | None
Emit = Callable[[Request, Event], None]


class Lane:
    """Rows that can share a pass, one for each request that is answered.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self.cache = RowCache(num_layers)
        self.requests: list[Request] = []

    def drop(self, row: int, *, wipe: bool = False) -> None:
        """Free the place of a request; see `RowCache.drop`."""
        self.cache.drop(row, wipe=wipe)
        self.requests[row] = self.requests[-1]
        self.requests.pop()


@dataclass(eq=False)
class Prompts:
    """Prompts that are read together.

    Args:
        requests: whose they are, of one kind.
        ids: (rows, columns), padded on the left.
        cache: what was read.
        done: columns that were read, or were known before.
    """

    requests: list[Request]
    ids: Tensor
    cache: RowCache
    done: int = 0

    @property
    def kind(self) -> Kind:
        """What the rows share."""
        ready = self.requests[0].ready
        assert ready is not None
        return ready.kind

    @property
    def wants_logprobs(self) -> bool:
        """Whether those of the prompts are asked for."""
        return self.requests[0].job.prompt_logprobs


class Decoder:
    """Reads prompts and makes tokens, one pass after the other, in one thread.

    Args:
        base: the routed model.
        routing: tells its layers the settings of the rows.
        prefixes: beginnings of prompts that are known.
        hashes: content hashes of the experts.
        sizes: how much at once.
        emit: is told what becomes of each request.
    """

    def __init__(
        self, base: Base, routing: RowRouting, prefixes: PrefixCache, *, hashes: Mapping[str, str],
        sizes: Sizes, emit: Emit,
    ) -> None:  # fmt: skip
        self.model, self._pad_id = base.model, int(base.tokenizer.pad_token_id)
        self.routing, self.prefixes, self.sizes, self.emit = routing, prefixes, sizes, emit
        self._hashes = hashes
        self._stops = frozenset(stop_ids(base.model, base.tokenizer))
        self._num_layers = int(text_config(base.model).num_hidden_layers)
        self.lanes: dict[Kind, Lane] = {}
        self.prompts: Prompts | None = None

    @property
    def requests(self) -> list[Request]:
        """All that are answered now."""
        reading = [] if self.prompts is None else self.prompts.requests
        return [*reading, *(request for lane in self.lanes.values() for request in lane.requests)]

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values of the requests that are answered."""
        reading = 0 if self.prompts is None else self.prompts.cache.num_bytes
        return reading + sum(lane.cache.num_bytes for lane in self.lanes.values())

    def sweep(self, waiting: deque[Request]) -> None:
        """Free the places of requests that were broken off or whose time is up.

        Args:
            waiting: those that have not begun; they may be over, too.
        """
        now = time.monotonic()
        for request in tuple(waiting):
            if self._is_over(request, now):
                waiting.remove(request)
        if self.prompts is not None and all(self._is_over(request, now) for request in self.prompts.requests):
            self.prompts = None
        for lane in self.lanes.values():
            for row in reversed(range(len(lane.requests))):
                if self._is_over(lane.requests[row], now):
                    lane.drop(row)

    def _is_over(self, request: Request, now: float) -> bool:
        if not request.is_over and request.deadline is not None and now >= request.deadline:
            self.end(request, timed_out(request))
        return request.is_over

    def end(self, request: Request, error: Exception | None = None) -> None:
        """End a request; its place is freed by the next sweep, or by whoever calls."""
        request.is_over = True
        self.emit(request, error)

    def admit(self, waiting: deque[Request], before: int | None = None) -> None:
        """Begin with the prompts of requests that wait, in their order, as many as one chunk holds.

        Args:
            waiting: those that begin are taken off.
            before: the number of the first request that has to wait longer; None where all may begin.
        """
        while self.prompts is None and _may_begin(waiting, before):
            request = waiting[0]
            if self._prepared(request) and not self._fits(request, self.requests):
                return
            waiting.popleft()
            if not request.is_over:
                self.prompts = self._gather(request, waiting, before)

    def _prepared(self, request: Request) -> bool:
        """Make the setting of a request ready, unless it is over or cannot be used."""
        if request.ready is None and not request.is_over:
            try:
                request.ready = self.routing.ready(request.job.setting)
                request.computed_by = computed_by(request.job.setting, self._hashes)
            except (LoraryError, ValueError, RuntimeError) as error:
                self.end(request, error)
        return not request.is_over

    def _fits(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether keys and values of one more request have a place: all rows take as much as the longest."""
        if not others:
            return True
        longest = max(len(other.job.ids) + other.job.max_new_tokens for other in (request, *others))
        return len(others) < self.sizes.rows and (len(others) + 1) * longest <= self.sizes.tokens

    def _gather(self, first: Request, waiting: deque[Request], before: int | None) -> Prompts:
        """A request, with those behind it that can be read in the same pass."""
        assert first.ready is not None
        ids, is_plain = first.job.ids, not first.job.prompt_logprobs
        known = self.prefixes.find(first.computed_by, ids) if is_plain else None
        cache = RowCache(self._num_layers)
        if known is not None:
            cache.add(*known)
            return Prompts([first], torch.tensor([ids]), cache, known[1])
        group, running = [first], self.requests
        while _may_begin(waiting, before) and self._prepared(waiting[0]):
            request = waiting[0]
            assert request.ready is not None
            longest = max(len(r.job.ids) for r in (request, *group))
            if (
                request.ready.kind != first.ready.kind
                or request.job.prompt_logprobs == is_plain
                or (len(group) + 1) * longest > self.sizes.chunk
                or not self._fits(request, [*running, *group])
                or (is_plain and self.prefixes.find(request.computed_by, request.job.ids) is not None)
            ):
                break
            group.append(waiting.popleft())
        cache.begin([len(request.job.ids) for request in group])
        return Prompts(group, left_pad([request.job.ids for request in group], self._pad_id)[0], cache)

    def step(self) -> None:
        """Read one chunk of prompts, and make one token for each row."""
        if self.prompts is not None:
            try:
                self._read(self.prompts)
            except Exception as error:  # of this pass alone: what the others keep is as it was
                self._fail(self.prompts.requests, error)
                self.prompts = None
        for kind, lane in list(self.lanes.items()):
            if lane.requests:
                try:
                    self._answer(lane)
                except Exception as error:
                    self._fail(lane.requests, error)
                    del self.lanes[kind]

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        for request in requests:
            if not request.is_over:
                self.end(request, error)

    def _read(self, prompts: Prompts) -> None:
        """One chunk; after the last one the rows are answered."""
        num_rows, num_columns = prompts.ids.shape
        stop = min(num_columns, prompts.done + max(1, self.sizes.chunk // num_rows))
        logits = self._pass(
            prompts.cache, prompts.requests, prompts.ids[:, prompts.done : stop], every=prompts.wants_logprobs
        )
        if prompts.wants_logprobs:
            self._note_logprobs(prompts, logits)
        prompts.done = stop
        if stop == num_columns:
            self.prompts = None
            self._begin(prompts, logits[:, -1])

    def _begin(self, prompts: Prompts, logits: Tensor) -> None:
        """The first token of each row whose prompt was read."""
        lane = self.lanes.setdefault(prompts.kind, Lane(self._num_layers))
        rows = [row for row, request in enumerate(prompts.requests) if not request.is_over]
        for row in rows:
            request = prompts.requests[row]
            states, ids = prompts.cache.row(row), request.job.ids
            if request.job.prompt_logprobs:
                self.emit(request, request.prompt)
            else:
                self.prefixes.keep(request.computed_by, ids, states)
            if not request.job.max_new_tokens:
                self.end(request)
                continue
            (token,) = next_tokens(logits[row : row + 1], [request], self._stops)
            if self._tell(request, token):
                lane.cache.add(states, len(ids))
                lane.requests.append(request)

    def _answer(self, lane: Lane) -> None:
        """One token for each row."""
        requests = list(lane.requests)
        ids = torch.tensor([[request.last] for request in requests])
        logits = self._pass(lane.cache, requests, ids)[:, -1]
        tokens = next_tokens(logits, requests, self._stops)
        goes_on = [self._tell(request, token) for request, token in zip(requests, tokens, strict=True)]
        for row in reversed(range(len(requests))):
            if not goes_on[row]:
                lane.drop(row, wipe=tokens[row] is None)

    def _tell(self, request: Request, token: Token | None) -> bool:
        """Hand a token out; whether the answer goes on."""
        if token is None:
            error = BaseModelError(
                "a model must give logits that are numbers to be served", found=cause_of(self.model),
                remedy="lorary library verify for the adapters, or another --dtype",
            )  # fmt: skip
            self.end(request, error)
            return False
        self.emit(request, token)
        request.is_over |= token.finish is not None
        return token.finish is None

    def _pass(self, cache: RowCache, requests: Sequence[Request], ids: Tensor, *, every: bool = False) -> Tensor:
        """(rows, 1, vocabulary) logits of the last column, or of every one."""
        settings = [request.ready for request in requests]
        self.routing.use([ready for ready in settings if ready is not None])
        return row_pass(self.model, cache, ids, every=every)

    def _note_logprobs(self, prompts: Prompts, logits: Tensor) -> None:
        """Write down the log-probabilities of the prompts' tokens that a chunk predicts."""
        num_columns = prompts.ids.shape[1]
        for row, request in enumerate(prompts.requests):
            begin = num_columns - len(request.job.ids)
            if not request.prompt:
                request.prompt.append(Token(request.job.ids[0]))
            first = max(prompts.done, begin)
            last = min(prompts.done + logits.shape[1], num_columns - 1)
            if first < last:
                ids = prompts.ids[row, first + 1 : last + 1]
                predicting = logits[row, first - prompts.done : last - prompts.done]
                found = log_probabilities(predicting, ids, request.job.num_top or 0)
                request.prompt += [Token(i, *rest) for i, rest in zip(ids.tolist(), found, strict=True)]


def _may_begin(waiting: deque[Request], before: int | None) -> bool:
    return bool(waiting) and (before is None or waiting[0].number < before)


def timed_out(request: Request) -> RequestTimeoutError:
    """What a request ends with whose time is up."""
    return RequestTimeoutError(
        "an answer must be made in the time that its request allows",
        found=f"{request.num_new} tokens after {request.job.timeout:g} s",
        remedy="ask for fewer tokens, allow more time, or come when the server is less busy",
    )
