"""Another server that speaks OpenAI's interface and holds many adapters: what it holds, and requests to it.

Three kinds are known. They differ in how a request names an adapter, and in how one is loaded:

| kind     | a request names an adapter as           | loading                       |
|----------|-----------------------------------------|-------------------------------|
| vllm     | `model: ADAPTER`                        | POST /v1/load_lora_adapter    |
| sglang   | `model: BASE:ADAPTER`                   | POST /load_lora_adapter       |
| llamacpp | `lora: [{"id": NUMBER, "scale": 1}]`    | only when the server starts   |
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import httpx

from lorary.errors import UsageError
from lorary.serve.api_error import ApiError
from lorary.serve.upstream_settings import UpstreamSettings

# Of what a server says about an error, so much is passed on.
_MOST_SAID = 500
# Statuses of a server that may answer the same request a moment later. Until its first byte, nothing has happened that
# a second try could do twice.
_RETRIED = (502, 503, 504)
_FIRST_PAUSE = 0.2


@dataclass(frozen=True)
class Held:
    """What a server holds.

    Args:
        base: name of its base model.
        adapters: by name, what a request for it says beside its own fields.
        bare: what a request for the base says.
    """

    base: str
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bare: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A response whose first piece has come.

    Args:
        status: of HTTP.
        headers: those that are passed on.
        pieces: the body, byte for byte as it comes; closing it closes the connection, which breaks the answer off.
    """

    status: int
    headers: dict[str, str]
    pieces: AsyncGenerator[bytes, None]

    @property
    def is_streamed(self) -> bool:
        """Whether the body is a stream of events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")


class Upstream:
    """A client of another server.

    Args:
        settings: where it is, and how it is asked.
        transport: of httpx, for a server in this process; the network where None.
    """

    def __init__(self, settings: UpstreamSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.settings = settings
        self.url = settings.url.rstrip("/").removesuffix("/v1")
        token = settings.token
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(settings.timeout, connect=settings.connect_timeout),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
            trust_env=False,  # a proxy of the environment would get the token
        )
        self.held = Held("")
        self.kind = "vllm"

    async def look(self) -> Held:
        """Ask what the server holds.

        Raises:
            UsageError: if it does not answer, refuses the token, or says nothing that can be read.
        """
        models = (await self._get("/v1/models")).get("data")
        names = [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []
        if not names or not all(isinstance(model.get("id"), str) for model in names):
            raise self._unusable("/v1/models lists no model")
        self.kind = self.settings.kind or _kind_of(names)
        base = next((str(model["id"]) for model in names if not model.get("parent")), str(names[0]["id"]))
        others = [str(model["id"]) for model in names if model.get("parent")]
        if self.kind == "llamacpp":
            self.held = _of_llamacpp(base, await self._get("/lora-adapters"))
        elif self.kind == "sglang":
            bare = [name.removeprefix(f"{base}:") for name in others]
            self.held = Held(base, {name: {"model": f"{base}:{name}"} for name in bare}, {"model": base})
        else:
            self.held = Held(base, {name: {"model": name} for name in others}, {"model": base})
        return self.held

    async def load(self, name: str, path: str) -> None:
        """Have the server load an adapter.

        Args:
            name: under which it is asked for.
            path: of its folder, as the server sees it.

        Raises:
            UsageError: if it cannot or will not.
        """
        if self.kind == "llamacpp":
            raise UsageError(
                "llama.cpp's server takes adapters only when it starts",
                found=f"adapter '{name}' is not there",
                remedy=f"start it with --lora {name}.gguf",
            )
        place = "/v1/load_lora_adapter" if self.kind == "vllm" else "/load_lora_adapter"
        try:
            response = await self._client.post(place, json={"lora_name": name, "lora_path": path})
        except httpx.HTTPError as error:
            raise self._unusable(f"{place}: {_said(error)}") from error
        if response.status_code == 404 and self.kind == "vllm":
            raise UsageError(
                f"the server at {self.url} must let adapters be loaded",
                found=f"{place} is not there",
                remedy="start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; or with --lora-modules, and ours without "
                "--upstream-load",
            )
        if response.status_code >= 400:
            raise self._unusable(f"loading adapter '{name}' gave {response.status_code}: {_text_of(response.content)}")

    async def ask(self, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Send a request, again where the server cannot be reached or is about to be there, until the first byte.

        Args:
            path: of the interface.
            body: JSON.
            headers: that are passed on.

        Returns:
            The reply, whatever its status, except as below. The caller closes it.

        Raises:
            ApiError: 502 or 504 if the server gives no reply, fails, or refuses our token; 429 and 503 with its own
                Retry-After where it is busy.
        """
        pause = _FIRST_PAUSE
        last: httpx.TransportError | None = None
        for attempt in range(self.settings.retries + 1):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            try:
                return await self._asked(path, body, headers, is_last=attempt == self.settings.retries)
            except httpx.TimeoutException as error:
                # It may still be at work: asked again, it would do more.
                if not isinstance(error, httpx.ConnectTimeout):
                    raise self._failure(504, _said(error), "upstream_timeout") from error
                last = error
            except httpx.TransportError as error:
                last = error
            except _AgainError:
                continue
        assert last is not None
        raise self._failure(502, _said(last), "upstream_unreachable") from last

    async def _asked(self, path: str, body: bytes, headers: Mapping[str, str], *, is_last: bool) -> Reply:
        # Bytes are passed on as they come: nothing may have packed them.
        own = {"content-type": "application/json", "accept-encoding": "identity", **headers}
        request = self._client.build_request("POST", path, content=body, headers=own)
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code in _RETRIED and not is_last:
                raise _AgainError
            if response.status_code >= 500 or response.status_code in (401, 403, 429):
                raise self._refusal(response, await response.aread())
            pieces = response.aiter_raw()
            first = await anext(pieces, b"")
        except BaseException:
            await _closed(response)
            raise
        passed = {name: response.headers[name] for name in ("content-type",) if name in response.headers}
        return Reply(response.status_code, passed, _rest(response, first, pieces))

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _get(self, path: str) -> Any:
        try:
            response = await self._client.get(path)
            if response.status_code in (401, 403):
                raise UsageError(
                    f"the server at {self.url} must take our token",
                    found=f"{response.status_code} from {path}",
                    remedy="--upstream-token VARIABLE, which holds it",
                )
            response.raise_for_status()
            document = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._unusable(f"{path}: {_said(error)}") from error
        return {"data": document} if isinstance(document, list) else document

    def _unusable(self, found: str) -> UsageError:
        return UsageError(
            f"--upstream must be a server that speaks OpenAI's interface: {self.url}",
            found=found,
            remedy="start it first, and give its address without /v1",
        )

    def _refusal(self, response: httpx.Response, content: bytes) -> ApiError:
        """Why a server does not answer: its own fault, or that it is busy; never the client's."""
        said = f"{response.status_code}: {_text_of(content)}"
        after = response.headers.get("retry-after")
        headers = {} if after is None else {"retry-after": after}
        if response.status_code == 429:
            return self._failure(429, said, "upstream_busy", headers or {"retry-after": "1"})
        if response.status_code == 503:
            return self._failure(503, said, "upstream_unavailable", headers or {"retry-after": "1"})
        if response.status_code in (401, 403):
            return self._failure(502, f"{response.status_code}, so that it does not take our token", "upstream_token")
        return self._failure(502, said, "upstream_error")

    def _failure(self, status: int, found: str, code: str, headers: dict[str, str] | None = None) -> ApiError:
        rule = f"the server behind this one ({self.url}) must answer"
        return ApiError(status, rule, found=found, code=code, headers=headers)

    def broken(self, error: Exception) -> ApiError:
        """What is said where a reply breaks off in its midst."""
        return self._failure(502, f"its answer broke off: {_said(error)}", "upstream_broken")


class _AgainError(Exception):
    """The server may answer the same request a moment later."""


async def _rest(response: httpx.Response, first: bytes, pieces: Any) -> AsyncGenerator[bytes, None]:
    try:
        if first:
            yield first
        async for piece in pieces:
            yield piece
    finally:
        await _closed(response)


async def _closed(response: httpx.Response) -> None:
    """Close a response, also while the task is cancelled: the connection is what tells the server."""
    with suppress(httpx.HTTPError, RuntimeError):
        await asyncio.shield(response.aclose())


def _kind_of(models: list[dict[str, Any]]) -> str:
    owners = {str(model.get("owned_by")) for model in models}
    return next((kind for kind in ("sglang", "llamacpp") if kind in owners), "vllm")


def _of_llamacpp(base: str, document: Any) -> Held:
    adapters = document.get("data") if isinstance(document, dict) else None
    numbers = {
        PurePath(str(each["path"])).stem: int(each["id"])
        for each in adapters or ()
        if isinstance(each, dict) and "path" in each and "id" in each
    }
    # One that is not listed in a request has scale 0.
    named = {name: {"model": base, "lora": [{"id": number, "scale": 1.0}]} for name, number in numbers.items()}
    return Held(base, named, {"model": base, "lora": []})


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MOST_SAID] if str(error) else type(error).__name__


def _text_of(content: bytes) -> str:
    """What a server says about an error, from OpenAI's form where it has it."""
    import json

    text = content.decode(errors="replace").strip()
    with suppress(ValueError, AttributeError, TypeError):
        document = json.loads(text)
        error = document.get("error", document)
        text = str(error.get("message", text)) if isinstance(error, dict) else str(error)
    return text[:_MOST_SAID] or "no reason given"
