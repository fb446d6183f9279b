"""Requests that another server answers: this one decides which adapter, once per request, and passes bytes on."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lorary.errors import UsageError
from lorary.library.layout import ADAPTERS
from lorary.route.setting import CHAT
from lorary.serve.api_error import ApiError
from lorary.serve.gone import EventStream, unless_gone
from lorary.serve.problems import error_body, message_of
from lorary.serve.prompts import PLAIN
from lorary.serve.receipt import Receipt, constant_weights
from lorary.serve.router import Asked, Routed
from lorary.serve.schemas import RoutingFields
from lorary.serve.server import Server
from lorary.serve.upstream import Reply, Upstream

# Ours, which another server would take for its own or refuse. `top_k` counts experts here and tokens elsewhere.
_OURS = frozenset(RoutingFields.model_fields)
# A request that the server behind refuses for a reason of its own gets its own words.
_PASSED_ON = (400, 413, 415, 422)


@dataclass(frozen=True)
class Picked:
    """Which adapter of the server behind answers.

    Args:
        expert: its name in the library; None for the base.
        receipt: of the decision, as it is carried out.
    """

    expert: str | None
    receipt: Receipt


class Gateway:
    """Passes requests on.

    Args:
        server: decides; its engine makes no answers.
        upstream: answers.
    """

    def __init__(self, server: Server, upstream: Upstream) -> None:
        self.server, self.upstream = server, upstream
        self._settings = upstream.settings
        self._loading = asyncio.Lock()
        self._contents: dict[str, str] = {}

    async def start(self) -> None:
        """Look at what the server behind holds, and have it load what is missing, where that was asked for.

        Raises:
            UsageError: if it cannot be asked, or lacks experts.
        """
        try:
            await self.upstream.look()
            await self._hold(self.server.engine.experts)
            self._contents = {name: self._content(name) for name in self.server.engine.experts}
        except UsageError as error:
            self.server.start_error = error  # what calls this only says that it failed
            raise

    async def stop(self) -> None:
        """Close the connections."""
        await self.upstream.close()

    def upstream_name(self, expert: str) -> str:
        """What an expert is called there.

        One that is loaded from here has the hash of its content in its name: servers keep what they computed by name,
        and other content must never come under an old one.
        """
        name = f"{self._settings.adapter_prefix}{expert}"
        return f"{name}-{self._content(expert)[:8]}" if self._settings.load else name

    def template(self, requested: str | None) -> str:
        """The template of conversations, which the server behind writes by its own.

        Raises:
            ApiError: if another one is asked for.
        """
        if requested not in (None, CHAT):
            raise ApiError(
                400,
                "a conversation is written by the server behind this one, in its chat template",
                found=f"template: {requested}",
                remedy="/v1/completions takes prompts as they are",
                param="template",
            )
        return CHAT if self.server.prompts.has_chat else PLAIN

    async def respond(self, request: Request, endpoint: str, asked: Sequence[Asked]) -> Response:
        """Decide, and let the server behind answer; what was begun is broken off when the client leaves.

        Args:
            request: of the client.
            endpoint: `completions` or `chat/completions`.
            asked: its prompts; those of conversations without their text, which is not ours to write anew.

        Raises:
            ApiError: if the request cannot be passed on, or the server behind does not answer.
        """
        exchange = _Exchange(self, endpoint.partition("/")[0])
        with ExitStack() as stack:
            stack.enter_context(self.server.traffic.place())
            stack.callback(exchange.end)
            reply = await unless_gone(request, self._begun(exchange, request, endpoint, asked))
            headers = {**reply.headers, "x-request-id": request.state.request_id, **exchange.picked.receipt.headers()}
            if not reply.is_streamed:
                content = await unless_gone(request, exchange.whole(reply))
                return Response(content, reply.status, headers)
            left = max(0.0, self.server.settings.timeout - (perf_counter() - exchange.start))
            return EventStream(exchange.pieces(reply), headers, left, stack.pop_all().close)

    async def _begun(self, exchange: "_Exchange", request: Request, endpoint: str, asked: Sequence[Asked]) -> Reply:
        server = self.server
        for each in asked:
            server.prompts.check(each.ids, 1)
        exchange.routed = await server.router.route(asked, request.state.request_id)
        exchange.picked = self._picked(exchange.routed)
        server.shadow(exchange.routed)
        raw = json.loads(await request.body())
        exchange.has_trace = bool(raw.get("trace"))
        body = {key: value for key, value in raw.items() if key not in _OURS}
        if endpoint == "completions" and any(not _is_as_given(routed) for routed in exchange.routed):
            ids = [list(routed.ids) for routed in exchange.routed]
            body["prompt"] = ids if len(ids) > 1 else ids[0]
        headers = _passed_headers(request)
        for is_last in (False, True):
            body.update(await self._named(exchange.picked.expert))
            reply = await self.upstream.ask(f"/v1/{endpoint}", json.dumps(body).encode(), headers)
            if reply.status < 400 or reply.status in _PASSED_ON:
                break
            await reply.pieces.aclose()
            if not (reply.status == 404 and self._settings.load and not is_last):
                raise self._not_held(exchange.picked.expert or "the base", f"{reply.status}")
            await self.upstream.look()  # it was started anew, and has lost what it loaded
        self.server.metrics.first_token.observe(perf_counter() - exchange.start)
        return reply

    def _picked(self, routed: Sequence[Routed]) -> Picked:
        """The one adapter that answers all prompts of a request."""
        picked = [self._one(each) for each in routed]
        if len({each.expert for each in picked}) > 1:
            raise ApiError(
                400,
                "the prompts of one request must be answered by one adapter, since the server behind takes one",
                found=", ".join(sorted({each.expert or "base" for each in picked})),
                remedy="ask for each prompt in a request of its own",
                param="prompt",
                code="several_experts",
            )
        return picked[0]

    def _one(self, routed: Routed) -> Picked:
        receipt = routed.receipt
        weights = constant_weights(routed.setting, self.server.engine.experts)
        if weights is None:
            raise _per_token(routed)
        if not weights:
            return Picked(None, receipt)
        if receipt.is_fallback and len(weights) > 1:
            return Picked(None, _noted(receipt, (), "the base answers, since the server behind takes one adapter"))
        if len(weights) > 1 and routed.asked.target.setting.decides == "always":
            raise _several(weights, "a router that decides, or one expert")
        name, weight = max(weights.items(), key=lambda pair: pair[1])
        if len(weights) == 1 and weight == 1.0:
            return Picked(name, receipt)
        if self._settings.strict:
            raise _several(weights, "top_k: 1, or start this server without --strict")
        note = f"{name} answers alone, since the server behind takes one adapter"
        return Picked(name, _noted(receipt, ((name, 1.0),), note))

    @property
    def _held(self) -> Mapping[str, Mapping[str, Any]]:
        return self.upstream.held.adapters

    async def _named(self, expert: str | None) -> Mapping[str, Any]:
        """What a request says to be answered by an expert, or by the base; one that came lately is loaded first."""
        if expert is None:
            return self.upstream.held.bare
        name = self.upstream_name(expert)
        content = self._content(expert)
        if not self._settings.load and self._contents.setdefault(expert, content) != content:
            # It would answer with what it holds under the name, which this process decides by no longer.
            raise self._not_held(name, "the library's adapter was replaced since the start, and may be another there,")
        if name not in self._held:
            try:
                await self._hold([expert])
            except UsageError as error:
                raise self._not_held(name, error.found or error.rule) from error
        return self._held[name]

    def _content(self, expert: str) -> str:
        return str(self.server.library.provenance(expert)["content_hash"])

    async def _hold(self, experts: Sequence[str]) -> None:
        """See to it that the server behind holds experts; those that it lacks are loaded, where that was asked for."""
        async with self._loading:
            missing = [name for name in experts if self.upstream_name(name) not in self._held]
            for name in missing if self._settings.load else ():
                folder = (self.server.library.path / ADAPTERS / name).resolve()
                await self.upstream.load(self.upstream_name(name), str(folder))
            if missing:
                await self.upstream.look()
        missing = [name for name in missing if self.upstream_name(name) not in self._held]
        if missing:
            names = ", ".join(map(self.upstream_name, missing[:5]))
            raise UsageError(
                f"the server at {self.upstream.url} must hold every expert of the library, under its name",
                found=f"{len(missing)} are not there: {names}; it holds {', '.join(sorted(self._held)[:5]) or 'none'}",
                remedy="--upstream-load has it load them; --upstream-prefix TEXT where its names begin with a text",
            )

    def _not_held(self, name: str, found: str) -> ApiError:
        return ApiError(
            502,
            f"the server behind this one ({self.upstream.url}) must hold the adapter and answer",
            found=f"{found} for {name}",
            remedy="load it there again, or start this server with --upstream-load",
            code="upstream_error",
        )


class _Exchange:
    """One request, and what became of it.

    Args:
        gateway: that passes it on.
        endpoint: by which it came.
    """

    def __init__(self, gateway: Gateway, endpoint: str) -> None:
        self._gateway, self._endpoint, self.start = gateway, endpoint, perf_counter()
        self.routed: list[Routed] = []
        self.picked = Picked(None, _NOTHING)
        self.has_trace = False
        self._outcome = "broken off"

    async def whole(self, reply: Reply) -> bytes:
        """The body of a reply that is no stream."""
        try:
            content = b"".join([piece async for piece in reply.pieces])
        except Exception as error:
            raise self._gateway.upstream.broken(error) from error
        finally:
            await reply.pieces.aclose()
        self._outcome = "ok" if reply.status < 400 else f"status {reply.status}"
        if self.has_trace and reply.status < 400:
            with suppress(ValueError, TypeError):
                return json.dumps({**json.loads(content), "lorary": self.picked.receipt.to_json()}).encode()
        return content

    async def pieces(self, reply: Reply) -> AsyncGenerator[bytes, None]:
        """The body of a stream, byte for byte; where it breaks off, an event says so."""
        try:
            if self.has_trace:
                yield _event({"choices": [], "lorary": self.picked.receipt.to_json()})
            async for piece in reply.pieces:
                yield piece
            self._outcome = "ok"
        except Exception as error:
            self._outcome = "upstream_broken"
            known = self._gateway.upstream.broken(error)
            # Whatever came last of an event that is not whole ends here, and is none.
            yield b"\n\n" + _event(error_body(known.status, message_of(known), known.param, known.code))
        finally:
            await reply.pieces.aclose()

    def end(self) -> None:
        """Count and keep the decision."""
        server = self._gateway.server
        for routed in self.routed:
            shown = replace(routed, receipt=replace(self.picked.receipt, id=routed.receipt.id))
            server.record(
                shown,
                self._endpoint,
                routed.asked.source or routed.ids,
                outcome=self._outcome,
                upstream=self._gateway.upstream.url,
                seconds=round(perf_counter() - self.start, 4),
            )


_NOTHING = Receipt("", "", "", False, None, None, "", (), (), 0.0, 0)


def _noted(receipt: Receipt, experts: tuple[tuple[str, float], ...], note: str) -> Receipt:
    """A receipt as it is carried out, where that is not as it was decided."""
    return replace(receipt, experts=experts, sentence=f"{receipt.sentence}; {note}")


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _several(weights: Mapping[str, float], remedy: str) -> ApiError:
    found = ", ".join(f"{name} {weight:.0%}" for name, weight in list(weights.items())[:10])
    rule = "the server behind this one takes one adapter, with the weight 1"
    return ApiError(400, rule, found=found, remedy=remedy, param="model", code="several_experts")


def _per_token(routed: Routed) -> ApiError:
    return ApiError(
        400,
        "the server behind this one takes one adapter per request, so that a router must decide per request",
        found=f"router '{routed.setting.router}' decides per {routed.setting.decides}",
        remedy="a router that decides per request, or lorary export --for vllm",
        param="router",
    )


def _is_as_given(routed: Routed) -> bool:
    """Whether the server behind makes the same ids of a prompt as it was given, in no template."""
    return routed.ids == routed.asked.ids and routed.asked.template in (None, PLAIN)


def _passed_headers(request: Request) -> dict[str, str]:
    """The headers of a client that are passed on; its token is for us."""
    names = ("accept", "x-session-id", "traceparent")
    kept = {name: request.headers[name] for name in names if name in request.headers}
    return {**kept, "x-request-id": request.state.request_id}
