"""What stands between the network and the interface: tokens, bounds, headers. Nothing of a request is read before."""

import asyncio
import base64
import hmac
import secrets
import time
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorary.serve.adapters import PATH as ADAPTERS
from lorary.serve.api_error import ApiError
from lorary.serve.problems import error_response
from lorary.serve.server import Server

# Open to everybody: whether the process lives and takes requests.
OPEN_PATHS = frozenset({"/health", "/ready"})
CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS: Mapping[str, str] = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
# Paths whose requests are counted by name; others together.
_COUNTED = (
    "/v1/completions", "/v1/chat/completions", "/v1/route", "/v1/models", "/v1/adapters", "/v1/decisions", "/v1/usage",
    "/health", "/ready", "/metrics",
)  # fmt: skip


class Guard:
    """Refuses requests before the interface sees them, and adds headers to every response.

    Args:
        app: the interface.
        server: whose settings it keeps.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server, self._settings = app, server, server.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, is_started = time.perf_counter(), 500, False
        scope["state"] = {**scope.get("state", {}), "request_id": secrets.token_hex(12)}

        async def send_with_headers(message: Message) -> None:
            nonlocal status, is_started
            if message["type"] == "http.response.start":
                status, is_started = message["status"], True
                headers = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "x-request-id": scope["state"]["request_id"]}.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._guarded(scope, receive, send_with_headers)
        except Exception as error:
            self._server.report(error)
            if not is_started:
                await error_response(error)(scope, receive, send_with_headers)
        finally:
            path = scope["path"]
            endpoint = next((name for name in _COUNTED if path == name or path.startswith(f"{name}/")), "other")
            metrics = self._server.metrics
            metrics.requests.labels(endpoint, str(status)).inc()
            metrics.request_time.labels(endpoint).observe(time.perf_counter() - start)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            if scope["path"].startswith(ADAPTERS) and scope["method"] in CHANGING:
                limited = _Counted(receive, self._settings.max_upload, self._settings.timeout)
                await self._app(scope, limited, send)
            else:
                body = await self._body(scope, receive)
                await self._app(scope, _Replayed(body, receive), send)
        except ApiError as error:
            await error_response(error)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, settings, path = Headers(scope=scope), self._settings, scope["path"]
        # A page of another site could give its own name the address of this machine.
        if settings.is_local and (host := _host_of(headers.get("host", ""))) not in (*LOCAL_HOSTS, settings.host):
            raise ApiError(421, "a server for this machine alone is asked by its own name", found=repr(host[:100]))
        if scope["method"] in CHANGING and headers.get("sec-fetch-site", "none") == "cross-site":
            raise ApiError(403, "a page of another site may not ask for anything", found="sec-fetch-site: cross-site")
        if path in OPEN_PATHS:
            return
        given, kind = _token_of(headers.get("authorization", ""))
        # Browsers send a password by themselves, whoever made the page: it changes nothing.
        is_admin = kind == "bearer" and _is_same(given, settings.admin_token)
        if settings.token is not None and not (is_admin or _is_same(given, settings.token)):
            raise ApiError(
                401,
                "the request must bring the token of this server",
                found="another one" if given else "none",
                remedy="Authorization: Bearer TOKEN",
                code="invalid_api_key",
                # A browser that opens the page asks for it: any name, and the token as the password.
                headers={"www-authenticate": 'Basic realm="lorary"' if path == "/" else "Bearer"},
            )
        if path.startswith(ADAPTERS) and scope["method"] in CHANGING and not is_admin:
            remedy = "Authorization: Bearer ADMIN_TOKEN" if settings.admin_token else "start it with --admin-token"
            raise ApiError(403, "only who has the admin token may change the library", remedy=remedy, code="admin_only")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within its bounds of size and time."""
        most = self._settings.max_body
        _check_length(Headers(scope=scope), most)
        counted, chunks, is_whole = _Counted(receive, most, self._settings.body_timeout), [], False
        while not is_whole:
            message = await counted()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client has left")
            chunks.append(message.get("body", b""))
            is_whole = not message.get("more_body", False)
        return b"".join(chunks)


class _Counted:
    """What a client sends, refused where it is too much or takes too long.

    Args:
        receive: of the server.
        most: bytes.
        timeout: seconds for all of it.
    """

    def __init__(self, receive: Receive, most: int, timeout: float) -> None:
        self._receive, self._most, self._number = receive, most, 0
        self._deadline = time.monotonic() + timeout
        self._is_whole = False

    async def __call__(self) -> Message:
        if self._is_whole:  # what comes now is that the client leaves
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body of a request must come in time", headers={"connection": "close"}) from None
        self._number += len(message.get("body", b""))
        if self._number > self._most:
            raise _too_large(self._most, self._number)
        self._is_whole = not message.get("more_body", False)
        return message


class _Replayed:
    """A body that was read already, and then what else the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _check_length(headers: Headers, most: int) -> None:
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(most, int(length[:20]))


def _too_large(most: int, found: int) -> ApiError:
    rule = f"the body of a request may have {most:,} bytes here"
    return ApiError(413, rule, found=f"{found:,} or more", code="too_large", headers={"connection": "close"})


def _host_of(host: str) -> str:
    """The name in a `Host` header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _token_of(authorization: str) -> tuple[str, str]:
    """The token that a request brings, and how: `bearer`, or `basic` where it is a password."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() != "basic":
        return value.strip(), kind.lower()
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2], "basic"
    except ValueError:
        return "", "basic"


def _is_same(given: str, token: str | None) -> bool:
    """Whether a token is the right one, in a time that does not tell how much of it is."""
    return token is not None and hmac.compare_digest(given.encode(), token.encode())
