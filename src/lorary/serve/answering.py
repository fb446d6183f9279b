"""One request inside the engine, and the stream through which its answer leaves it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from lorary.evaluate.generation import Sampler
from lorary.model.row_routing import Ready
from lorary.serve.engine import Job, Token


class AnswerStream:
    """An answer while it is made. Read and written in the event loop alone.

    Args:
        cancel: tells the engine to break it off.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.prompt: Sequence[Token] = ()
        self.is_over = False
        self._cancel = cancel
        self._tokens: deque[Token] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[Token]:
        return self

    async def __anext__(self) -> Token:
        """The next token.

        Raises:
            LoraryError: what went wrong: the engine stopped or failed, the time was up, the setting cannot be used.
        """
        while not self._tokens:
            if self._error is not None:
                raise self._error
            if self.is_over:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._tokens.popleft()

    def cancel(self) -> None:
        """Break the answer off and free its place; any number of times, at any time."""
        self._cancel()
        self.end()

    def begin(self, prompt: Sequence[Token]) -> None:
        """Take the prompt's tokens."""
        self.prompt = prompt

    def put(self, token: Token) -> None:
        """Take one token of the answer; the last one says so."""
        if not self.is_over:
            self._tokens.append(token)
            self.is_over = token.finish is not None
            self._news.set()

    def end(self, error: Exception | None = None) -> None:
        """There is nothing more to come."""
        if not self.is_over:
            self.is_over, self._error = True, error
            self._news.set()


@dataclass(eq=False)
class Request:
    """A job that was accepted.

    Args:
        job: the job.
        stream: where its tokens go.
        deadline: on the clock of `time.monotonic`; None for none.
        number: counts the requests that were accepted.
        is_over: whether it has ended, for whatever reason; its place is free at the next step.
        ready: its setting, once its turn has come.
        computed_by: what computes its keys and values.
        sampler: draws its tokens; None takes the likeliest ones.
        num_new: tokens of the answer so far.
        last: the last of them.
    """

    job: Job
    stream: AnswerStream
    deadline: float | None
    number: int
    is_over: bool = False
    ready: Ready | None = None
    computed_by: bytes = b""
    sampler: Sampler | None = None
    num_new: int = 0
    last: int = 0
    prompt: list[Token] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, number: int, cancel: Callable[["Request"], None]) -> "Request":
        """A request for a job.

        Args:
            job: the job.
            number: counts them.
            cancel: tells the engine that it was broken off.
        """
        deadline = None if job.timeout is None else time.monotonic() + job.timeout
        request = cls(job, AnswerStream(lambda: cancel(request)), deadline, number)
        if job.sampling is not None:
            seed = job.seed if job.seed is not None else time.time_ns() % 2**63
            request.sampler = Sampler(job.sampling.temperature, job.sampling.top_p, [seed])
        return request
