"""What runs in the process of a replica: one engine, asked from outside, its tokens handed out in batches. No Ray here.

Questions arrive by name and their answers leave as values, errors too: what a transport does to exceptions is its own.
"""

import asyncio
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorary.data.template import Ids
from lorary.errors import LoraryError
from lorary.evaluate.decisions import Decision
from lorary.route.setting import Routing
from lorary.serve.engine import Engine, Job, Stream, Token, Traced
from lorary.serve.versions import change_all

# Beside a token: the prompt's tokens, which come before the first one, or what the answer was broken off by.
Event = Token | tuple[Token, ...] | Exception
# Seconds after which a replica that has no tokens to hand out says that it lives.
BEAT_S = 5.0


@dataclass(frozen=True)
class Facts:
    """What a replica says of the model that it loaded.

    Args:
        experts: names, sorted.
        routing: the setting that the library's own name means.
        context: positions of the base; None where it has no bound.
        num_tokens: token ids that the base knows.
    """

    experts: tuple[str, ...]
    routing: Routing
    context: int | None
    num_tokens: int


class Replica:
    """One engine that is asked from another process.

    Args:
        make: loads the model, and gives the engine and what it says of itself.
    """

    def __init__(self, make: Callable[[], tuple[Engine, Facts]]) -> None:
        self._make = make
        self._engine: Engine | None = None
        self._facts: Facts | None = None
        self._loading = asyncio.Lock()
        self._streams: dict[int, Stream] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._events: list[tuple[int, Event]] = []
        self._news = asyncio.Event()

    async def answer(self, question: str, *arguments: Any) -> tuple[Any, Exception | None]:
        """Answer a question, which is the name of a method below.

        Returns:
            The answer, and an error in its place. One that is none of ours says nothing of itself, since its text may
            hold a prompt; stderr says where it was raised.
        """
        try:
            return await getattr(self, f"_{question}")(*arguments), None
        except Exception as error:
            return None, _told(error)

    async def _load(self) -> Facts:
        async with self._loading:
            if self._facts is None:
                engine, facts = await asyncio.to_thread(self._make)
                await engine.start()
                self._engine, self._facts = engine, facts
        return self._facts

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None, "a replica is asked to load first"
        return self._engine

    async def _submit(self, number: int, job: Job) -> None:
        stream = self._loaded.submit(job)
        self._streams[number] = stream
        self._tasks[number] = asyncio.create_task(self._hand_out(number, stream, has_prompt=job.prompt_logprobs))

    async def _hand_out(self, number: int, stream: Stream, *, has_prompt: bool) -> None:
        try:
            async for token in stream:
                if has_prompt:
                    self._tell(number, tuple(stream.prompt))
                    has_prompt = False
                self._tell(number, token)
            if has_prompt:
                self._tell(number, tuple(stream.prompt))
        except Exception as error:
            self._tell(number, _told(error))
        finally:
            self._streams.pop(number, None)
            self._tasks.pop(number, None)

    def _tell(self, number: int, event: Event) -> None:
        self._events.append((number, event))
        self._news.set()

    async def _next(self) -> list[tuple[int, Event]]:
        """What the answers grew by since the last call, by the number of their job; nothing after a while."""
        try:
            async with asyncio.timeout(BEAT_S):
                await self._news.wait()
        except TimeoutError:
            return []
        self._news.clear()
        events, self._events = self._events, []
        return events

    async def _cancel(self, number: int) -> None:
        if (stream := self._streams.pop(number, None)) is not None:
            stream.cancel()
            self._tasks[number].cancel()

    async def _decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        return await self._loaded.decide(setting, prompts)

    async def _check(self, setting: Routing) -> None:
        await asyncio.to_thread(self._loaded.check, setting)

    async def _trace(self, setting: Routing, ids: Ids) -> Traced:
        return await self._loaded.trace(setting, ids)

    async def _change(self, removed: Sequence[str], seated: Sequence[str]) -> Mapping[str, Exception]:
        """Take experts out and seat others, all of them at once. Returns what could not be, with the reasons."""
        refused = await change_all(self._loaded.unseat, self._loaded.seat, removed, seated)
        return {name: _told(error) for name, error in refused.items()}


def _told(error: Exception) -> Exception:
    """An error as it may leave the process."""
    if isinstance(error, LoraryError):
        return error.with_traceback(None)
    place = "".join(traceback.format_tb(error.__traceback__)[-4:])
    print(f"error: {type(error).__name__} in a replica\n{place}", file=sys.stderr, flush=True)
    return RuntimeError(f"{type(error).__name__} in a replica")
