"""Which version of each adapter is seated, and how the engine follows the library when other commands change it."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from lorary.errors import LoraryError

# Seconds between two looks at the library.
LOOK_S = 2.0

Stamps = Mapping[str, object]
Seat = Callable[[str], Awaitable[None]]
# Takes experts out and seats others; returns what could not be, with the reasons.
Change = Callable[[Sequence[str], Sequence[str]], Awaitable[Mapping[str, Exception]]]


class Versions:
    """The adapters that an engine has seated, by the stamps that they had in the library.

    A change that requests ask for is made at once. What other commands change in the library is noticed once the
    library has been the same for two looks.

    Args:
        seated: what the engine has loaded, or something older.
        stamps: the library's adapters as of now: `Library.stamps`.
        change: has the engine change its experts.
        say: is told what other commands have changed; stderr where None.

    Attributes:
        lock: held while experts change.
    """

    def __init__(
        self, seated: Stamps, stamps: Callable[[], Stamps], change: Change, say: Callable[[str], None] | None = None
    ) -> None:
        self.lock = asyncio.Lock()
        self._seated, self._stamps, self._change, self._say = dict(seated), stamps, change, say or to_stderr
        # What the engine refused, by name and stamp: it is not tried again before it changes.
        self._refused: dict[str, object] = {}
        self._is_empty = False
        self._requests: AbstractAsyncContextManager[Any] = nullcontext()
        self._changed: Callable[[], Awaitable[None]] | None = None

    def serve(self, requests: AbstractAsyncContextManager[Any], changed: Callable[[], Awaitable[None]]) -> None:
        """Follow the library beside requests that change it.

        Args:
            requests: held by a request while it changes library and experts, so that no half of it is noticed.
            changed: called when other commands have changed which experts there are.
        """
        self._requests, self._changed = requests, changed

    @property
    def names(self) -> tuple[str, ...]:
        """The experts that are seated, sorted."""
        return tuple(sorted(self._seated))

    async def seat(self, name: str) -> None:
        """Seat the library's adapter of a name.

        Raises:
            LoraryError: if the engine cannot seat it; nothing has changed then.
        """
        await self._change_one((), (name,))

    async def unseat(self, name: str) -> None:
        """Take an expert out.

        Raises:
            LoraryError: if it must stay; nothing has changed then.
        """
        await self._change_one((name,), ())

    async def _change_one(self, removed: Sequence[str], seated: Sequence[str]) -> None:
        async with self.lock:
            refused = await self._make(removed, seated)
        for error in refused.values():
            raise error

    async def _make(self, removed: Sequence[str], seated: Sequence[str]) -> Mapping[str, Exception]:
        stamps = self._stamps()  # before: what changes meanwhile is noticed later
        kept = dict(self._seated)
        for name in removed:  # nobody shall name them from now on
            self._seated.pop(name, None)
        refused = await self._change(removed, seated)
        for name in removed:
            if name in refused:
                self._seated[name] = kept[name]
        for name in seated:
            if name not in refused:
                self._seated[name] = stamps.get(name)
        return refused

    async def watch(self) -> None:
        """Notice what other commands change in the library, once they are done."""
        last: Stamps = self._seated
        while True:
            await asyncio.sleep(LOOK_S)
            async with self._requests:
                last = await self._look(last)

    async def _look(self, last: Stamps) -> Stamps:
        try:
            now = dict(await asyncio.to_thread(self._stamps))
        except (LoraryError, OSError) as error:  # it is away, or written right now
            self._say(f"the library cannot be read, and is served as it was: {error}")
            return {}
        if not now and not self._is_empty:
            self._say("the library holds no adapter any more: those that it held are served until it has one again")
        self._is_empty = not now
        if now and now == last and any(self._difference(now)):
            try:
                async with self.lock:
                    await self.follow(now)
            except Exception as error:  # the next change is to be noticed all the same
                self._say(f"the library's change was not followed: {error}")
        return now

    def _difference(self, now: Stamps) -> tuple[list[str], list[str]]:
        """Adapters to be taken out, and to be seated, for the engine to hold the library as it is."""
        refused, seated = self._refused, self._seated
        must_stay = {name for name, stamp in refused.items() if stamp is None}
        come = [name for name, stamp in now.items() if stamp not in (seated.get(name), refused.get(name))]
        return sorted(set(seated) - set(now) - must_stay), sorted(come)

    async def follow(self, now: Stamps | None = None) -> None:
        """Bring the experts to the library as it is; the caller holds the lock."""
        now = self._stamps() if now is None else now
        removed, seated = self._difference(now)
        if not (removed or seated):
            return
        self._say(f"the library has changed: {len(seated)} adapters come, {len(removed)} go")
        for name, error in (await self._make(removed, seated)).items():
            self._refused[name] = now.get(name)
            self._say(f"'{name}' is left as it was: {error}")
        if self._changed is not None:
            await self._changed()


async def change_all(
    unseat: Seat, seat: Seat, removed: Sequence[str], seated: Sequence[str]
) -> Mapping[str, Exception]:
    """Take experts out and seat others, all of them at once.

    Args:
        unseat: takes one out.
        seat: seats one.
        removed: names.
        seated: names.

    Returns:
        What could not be, with the reasons.
    """
    names = [*removed, *seated]
    ends = await asyncio.gather(*map(unseat, removed), *map(seat, seated), return_exceptions=True)
    return {name: end for name, end in zip(names, ends, strict=True) if isinstance(end, Exception)}


def to_stderr(line: str) -> None:
    """Say something to whoever runs the server."""
    print(line, file=sys.stderr, flush=True)
