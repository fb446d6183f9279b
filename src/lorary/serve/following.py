"""The engine of one process, which follows its library whoever changes it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from lorary.model.base import Base
from lorary.serve.batching import RoutedEngine
from lorary.serve.sizes import Sizes
from lorary.serve.versions import Stamps, Versions, change_all


class FollowingEngine(RoutedEngine):
    """A `RoutedEngine` that seats what other commands add to the library, and takes out what they remove.

    Args:
        base: as for `RoutedEngine`.
        sizes: likewise.
        seated: the library's stamps from before its experts were seated.
        stamps: those of now: `Library.stamps`.
    """

    def __init__(self, base: Base, sizes: Sizes, seated: Stamps, stamps: Callable[[], Stamps]) -> None:
        super().__init__(base, sizes)
        self.versions = Versions(seated, stamps, self._change_all)
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to take jobs, and to look at the library."""
        await super().start()
        self._watching = asyncio.create_task(self.versions.watch())

    async def stop(self, *, drain: float) -> None:
        """Take no more jobs, finish those that were accepted for at most `drain` seconds, break off the rest."""
        if self._watching is not None:
            self._watching.cancel()
        await super().stop(drain=drain)

    async def seat(self, name: str) -> None:
        """Seat the library's adapter of a name; as `RoutedEngine.seat`."""
        await self.versions.seat(name)

    async def unseat(self, name: str) -> None:
        """Take an expert out; as `RoutedEngine.unseat`."""
        await self.versions.unseat(name)

    async def _change_all(self, removed: Sequence[str], seated: Sequence[str]) -> Mapping[str, Exception]:
        return await change_all(super().unseat, super().seat, removed, seated)
