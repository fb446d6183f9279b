"""One process that listens, answers, and ends without losing what it accepted."""

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorary.errors import UsageError
from lorary.serve.server import Server

# Bytes of the head of a request.
_MOST_HEAD = 16_384
# Connections for each request that may be under way: those that wait for an answer, and idle ones.
_CONNECTIONS = 4
_KEEP_ALIVE_S = 15


def reserve(host: str, port: int) -> socket.socket:
    """A socket that has its port; nobody can connect to it before the server listens.

    Raises:
        UsageError: if the address does not exist here, or the port is taken.
    """
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((host, port))
        return place
    except OSError as error:
        place.close()
        reason = error.strerror or str(error)
        raise UsageError(
            "the server must be able to listen on its port",
            found=f"{host}:{port}: {reason}",
            remedy="--port 0 takes a free one",
        ) from None


def run(app: FastAPI, server: Server, place: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until a signal ends it: requests that were accepted are finished, others refused.

    Args:
        app: the interface.
        server: that it is of.
        place: where to listen.
        ready: called with the address once requests are taken.

    Raises:
        LoraryError: if the server cannot start.
        KeyboardInterrupt: if a second signal ended it at once.
    """
    listener = Listener(app, server, ready)
    try:
        asyncio.run(listener.serve([place]))
    except (
        SystemExit
    ):  # what uvicorn makes of a start that fails, newer versions at least; it says nothing of the cause
        if server.start_error is None:
            raise
    if server.start_error is not None:
        raise server.start_error
    if listener.force_exit:  # not all that was accepted was finished
        raise KeyboardInterrupt


class _BoundedHead(H11Protocol):
    """Closes a connection on which the head of a request does not come in time; uvicorn only bounds idle ones."""

    seconds = 30.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_asked():
            self._unwatch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unwatch()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _is_asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        self._late: asyncio.TimerHandle | None = self.loop.call_later(self.seconds, self._close_late)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        if not (self._is_asked() or self.transport.is_closing()):
            self.transport.close()


class Listener(uvicorn.Server):
    """Listens; tells the interface of the first signal, and leaves at once on a second one.

    Args:
        app: the interface.
        server: that it is of.
        ready: called with the address once requests are taken.
    """

    def __init__(self, app: FastAPI, server: Server, ready: Callable[[str], None]) -> None:
        settings = server.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=type("BoundedHead", (_BoundedHead,), {"seconds": settings.body_timeout}),
                ws="none",
                lifespan="on",
                log_level="critical",
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=_MOST_HEAD,
                limit_concurrency=_CONNECTIONS * settings.max_requests + 16,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(settings.drain)),
            )
        )
        self._server, self._ready = server, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Obey a signal."""
        self._server.traffic.is_draining = True
        self.force_exit, self.should_exit = self.should_exit, True
        if not self.force_exit:
            print("ending: requests that were accepted are finished first", file=sys.stderr, flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals here; unlike uvicorn, a signal that has been obeyed is not raised again."""
        if threading.current_thread() is not threading.main_thread():  # which alone may
            yield
            return
        old: dict[int, Any] = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
