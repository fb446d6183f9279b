"""Work that ends when the client leaves."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from lorary.serve.api_error import ApiError

Result = TypeVar("Result")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Do something for a client, and break it off when the client leaves.

    Args:
        request: of the client; its body has been read.
        work: to be done.

    Raises:
        ApiError: if the client has left; nobody is there to read it.
    """
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ApiError(499, "the client has left")
        return doing.result()
    finally:
        await _cancelled(doing, leaving)


class EventStream(StreamingResponse):
    """Server-sent events, broken off when the client leaves or takes too long to read.

    Args:
        events: as bytes.
        headers: of the response.
        timeout: seconds that all of it may take.
        on_end: called at the end, whatever the end is.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        timeout: float,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events, self._timeout, self._on_end = events, timeout, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        sending = asyncio.create_task(self.stream_response(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _cancelled(sending, leaving)
            await self._events.aclose()
            self._on_end()


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Task[Any]") -> None:
    """Cancel tasks, and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
