"""A server of many adapters without a model, and a transport of httpx that streams from an app in this process."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

Json = dict[str, Any]


class LiveTransport(httpx.AsyncBaseTransport):
    """Passes pieces on as they are sent; closing a response is the client's leaving. httpx's own waits for the end."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body, left = await request.aread(), asyncio.Event()
        pieces: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        start: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        given = deque([{"type": "http.request", "body": body, "more_body": False}])
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method,
            "scheme": "http", "path": request.url.path, "raw_path": request.url.raw_path, "query_string": b"",
            "root_path": "", "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip

        async def receive() -> Json:
            if given:
                return given.popleft()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Json) -> None:
            if message["type"] == "http.response.start":
                start.set_result(message)
                return
            pieces.put_nowait(message.get("body", b""))
            if not message.get("more_body", False):
                pieces.put_nowait(None)

        async def run() -> None:
            try:
                await self.app(scope, receive, send)
                pieces.put_nowait(None)
            except Exception as error:
                pieces.put_nowait(error)

        task = asyncio.create_task(run())
        try:
            await asyncio.wait({task, start}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            left.set()
            await task
            raise
        if not start.done():
            error = pieces.get_nowait()
            raise error if isinstance(error, httpx.TransportError) else httpx.ReadError(repr(error))
        head = start.result()
        return httpx.Response(head["status"], headers=head["headers"], stream=_Live(pieces, task, left))


class _Live(httpx.AsyncByteStream):
    def __init__(self, pieces: Any, task: "asyncio.Task[None]", left: asyncio.Event) -> None:
        self._pieces, self._task, self._left = pieces, task, left

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece if isinstance(piece, httpx.TransportError) else httpx.ReadError(repr(piece))
            yield piece

    async def aclose(self) -> None:
        self._left.set()
        await self._task


@dataclass
class Script:
    """One response: its status, then its pieces, and what comes in the place of the last one."""

    status: int = 200
    pieces: Sequence[bytes] = (b'{"ok": true}',)
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    error: Exception | None = None
    pace: float = 0.0
    waits: float = 0.0


STREAM = {"content-type": "text/event-stream; charset=utf-8"}


@dataclass
class FakeUpstream:
    """Answers by its script, else with who was asked. It counts requests that were broken off."""

    models: list[Json]
    token: str | None = None
    can_load: bool = True
    lora_adapters: list[Json] = field(default_factory=list)
    script: deque[Script | Exception] = field(default_factory=deque)
    asked: list[tuple[str, Json, dict[str, str]]] = field(default_factory=list)
    num_left: int = 0
    num_sent: int = 0

    @classmethod
    def of_vllm(cls, adapters: Sequence[str], **settings: Any) -> "FakeUpstream":
        models = [{"id": "tiny", "object": "model", "owned_by": "vllm", "parent": None}]
        models += [{"id": name, "object": "model", "owned_by": "vllm", "parent": "tiny"} for name in adapters]
        return cls(models, **settings)

    @property
    def answered(self) -> list[Json]:
        """The bodies of requests for answers."""
        return [body for path, body, _ in self.asked if path.endswith("completions")]

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        message = await receive()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = json.loads(message["body"]) if message["body"] else {}
        self.asked.append((scope["path"], body, headers))
        script = self._reply(scope["path"], body, headers)
        if isinstance(script, Exception):
            raise script
        leaving = asyncio.create_task(receive())
        try:
            await self._send(script, send, leaving)
        finally:
            leaving.cancel()
            with suppress(asyncio.CancelledError):
                await leaving

    def _reply(self, path: str, body: Json, headers: dict[str, str]) -> Script | Exception:
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return Script(401, [b'{"error": {"message": "no key"}}'])
        if path == "/v1/models":
            return Script(pieces=[json.dumps({"object": "list", "data": self.models}).encode()])
        if path == "/lora-adapters":
            return Script(pieces=[json.dumps(self.lora_adapters).encode()])
        if path.endswith("load_lora_adapter"):
            if not self.can_load:
                return Script(404, [b'{"detail": "Not Found"}'])
            owner, name = self.models[0]["owned_by"], body["lora_name"]
            self.models.append({"id": name, "object": "model", "owned_by": owner, "parent": self.models[0]["id"]})
            return Script(pieces=[b"Success"])
        if self.script:
            return self.script.popleft()
        return Script(pieces=[json.dumps({"choices": [{"text": f"{body['model']} says so"}]}).encode()])

    async def _send(self, script: Script, send: Any, leaving: "asyncio.Task[Any]") -> None:
        async def leaves(seconds: float) -> bool:
            await asyncio.wait({leaving}, timeout=seconds)
            self.num_left += leaving.done()
            return leaving.done()

        if script.waits and await leaves(script.waits):
            return
        headers = [(name.encode(), value.encode()) for name, value in script.headers.items()]
        await send({"type": "http.response.start", "status": script.status, "headers": headers})
        for piece in script.pieces:
            if script.pace and await leaves(script.pace):
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self.num_sent += 1
        if script.error is not None:
            raise script.error
        await send({"type": "http.response.body", "body": b"", "more_body": False})
