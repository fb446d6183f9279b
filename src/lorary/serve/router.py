"""Who answers a request: the name of its model and its routing fields become a decision and a receipt."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorary.data.conversation import Conversation
from lorary.data.template import Ids
from lorary.data.text_of_ids import texts_of_ids
from lorary.evaluate.decisions import Decision, asks_base
from lorary.library.store import Library
from lorary.route import ROUTERS
from lorary.route.presets import merged
from lorary.route.setting import CHAT, Routing
from lorary.serve.api_error import ApiError
from lorary.serve.at_hand import routers_at_hand
from lorary.serve.engine import Engine
from lorary.serve.names import Names, Target, not_at_hand, served_name
from lorary.serve.prompts import Prompts
from lorary.serve.receipt import (
    Receipt,
    constant_weights,
    decided_receipt,
    no_trace,
    traced_layers,
    traced_tokens,
    undecided_receipt,
)
from lorary.serve.schemas import RoutingFields

# Sessions whose first decision is remembered; the ones that were longest not heard of are forgotten.
MOST_SESSIONS = 10_000
# Fields of a request, and the fields of a routing setting that they change.
_FIELDS = {
    "router": "router", "top_k": "top_k", "temperature_routing": "temperature", "threshold": "threshold",
    "null": "null", "allow": "allow", "per": "per",
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A prompt and who is asked to answer it.

    Args:
        target: what the model's name means, the request's own routing fields counted.
        ids: of the prompt.
        source: the text behind the ids, where another template may write it; None where the ids are taken as they are.
        template: that wrote it.
        session: that the request belongs to; None where it belongs to none.
    """

    target: Target
    ids: Ids
    source: str | Conversation | None = None
    template: str | None = None
    session: str | None = None

    @property
    def key(self) -> str:
        """By which a session finds its first decision: the same session, name and settings."""
        return hashlib.sha256(repr((self.session, self.target.name, self.target.setting)).encode()).hexdigest()


@dataclass(frozen=True)
class Routed:
    """A prompt and who answers it.

    Args:
        ids: of the prompt; written anew where the base answers in its own template.
        setting: who answers.
        receipt: why.
        asked: for what.
    """

    ids: Ids
    setting: Routing
    receipt: Receipt
    asked: Asked


class Router:
    """Decides who answers.

    Args:
        engine: that holds the experts.
        library: their library.
        prompts: writes prompts.
        default: what the library's own name means.
    """

    def __init__(self, engine: Engine, library: Library, prompts: Prompts, default: Routing) -> None:
        self.engine, self.default = engine, default
        self._library, self._prompts = library, prompts
        self._sessions: OrderedDict[str, Decision] = OrderedDict()
        self._routers: list[str] = []

    @property
    def names(self) -> Names:
        """The names that requests may give as `model`, as of now."""
        return Names(served_name(self._library.name), self.engine.experts, self._routers)

    async def target(self, model: str, fields: RoutingFields) -> Target:
        """What a request asks for.

        Raises:
            ApiError: if there is no such model, expert or router.
            LoraryError: as for `lorary.routing`.
        """
        target = self.names.target(model, self.default)
        given = {name: value for name in _FIELDS if (value := getattr(fields, name)) is not None}
        if not given:
            return target
        if target.kind in ("expert", "base"):
            raise ApiError(
                400,
                f"model '{model}' decides nothing, so that it takes no routing fields",
                found=", ".join(given),
                remedy=f"model '{self.names.library}'",
                param=next(iter(given)),
            )
        if fields.router in ROUTERS and fields.router not in (*self._routers, "base"):
            raise not_at_hand(str(fields.router), 400)
        missing = [name for name in fields.allow or () if name not in self.engine.experts]
        if missing:
            remedy = f"{len(self.engine.experts)} experts are served: GET /v1/adapters"
            raise ApiError(400, "allow must name experts", found=missing[:5], remedy=remedy, param="allow")
        changes = {_FIELDS[name]: value for name, value in given.items()}
        setting = merged(target.setting, changes)
        await asyncio.to_thread(self.engine.check, setting)  # it may wait for a pass
        return replace(target, setting=setting)

    async def route(self, asked: Sequence[Asked], request_id: str, *, is_dry: bool = False) -> list[Routed]:
        """Decide for prompts that share a target.

        Args:
            asked: the prompts.
            request_id: of their request.
            is_dry: whether nothing is answered, so that tokens are looked at to see who would.
        """
        setting = asked[0].target.setting
        ids = [f"{request_id}-{number}" if number else request_id for number in range(len(asked))]
        if setting.decides == "request":
            return await self._decided(asked, ids)
        routed = []
        for each, number in zip(asked, ids, strict=True):
            start, traced = time.perf_counter(), None
            if is_dry:
                is_constant = constant_weights(setting, self.engine.experts) is not None
                traced = no_trace() if is_constant else await self.engine.trace(setting, each.ids)
            ms = 1000 * (time.perf_counter() - start)
            receipt = undecided_receipt(number, setting, self.engine.experts, len(each.ids), traced=traced, ms=ms)
            routed.append(Routed(each.ids, setting, receipt, each))
        return routed

    async def _decided(self, asked: Sequence[Asked], ids: Sequence[str]) -> list[Routed]:
        setting, start = asked[0].target.setting, time.perf_counter()
        pinned = [self._pinned(each) for each in asked]
        unknown = [each.ids for each, decision in zip(asked, pinned, strict=True) if decision is None]
        decided = iter(await self.engine.decide(setting, unknown) if unknown else ())
        ms = 1000 * (time.perf_counter() - start)
        routed = []
        for each, number, old in zip(asked, ids, pinned, strict=True):
            decision = next(decided) if old is None else old
            if each.session is not None:
                self._pin(each, decision)
            routed.append(self._acting(each, number, decision, ms, is_pinned=old is not None))
        return routed

    def _acting(self, asked: Asked, number: str, decision: Decision, ms: float, *, is_pinned: bool) -> Routed:
        setting, ids = asked.target.setting, asked.ids
        if (
            asks_base(setting, decision)
            and asked.source is not None
            and self._prompts.has_chat
            and asked.template != CHAT
        ):
            decision, ids = decision.of_base(), self._prompts.encode(asked.source, CHAT)
        receipt = decided_receipt(number, setting, decision, ms, len(ids), pinned=is_pinned)
        return Routed(ids, decision.setting(setting), receipt, asked)

    async def seen(self, routed: Routed, new_ids: Sequence[int] = ()) -> Receipt:
        """The receipt with the experts of each token and of each group of layers.

        Args:
            routed: the prompt.
            new_ids: of its answer.
        """
        experts, ids = self.engine.experts, (*routed.ids, *new_ids)
        constant = constant_weights(routed.setting, experts)
        traced = no_trace() if constant is not None else await self.engine.trace(routed.setting, ids)
        texts = await asyncio.to_thread(texts_of_ids, self._prompts.tokenizer, ids)
        receipt = routed.receipt
        if constant is None:
            shown = undecided_receipt(
                receipt.id, routed.setting, experts, len(routed.ids), traced=traced, ms=receipt.ms
            )
            receipt = replace(receipt, experts=shown.experts, sentence=shown.sentence)
        constant = constant or {}
        return replace(receipt, tokens=traced_tokens(traced, texts, constant), layers=traced_layers(traced, constant))

    def _pinned(self, asked: Asked) -> Decision | None:
        if asked.session is None:
            return None
        decision = self._sessions.get(asked.key)
        if decision is not None and not {name for name, _ in decision.weights} <= set(self.engine.experts):
            return None
        return decision

    def _pin(self, asked: Asked, decision: Decision) -> None:
        self._sessions[asked.key] = decision
        self._sessions.move_to_end(asked.key)
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)

    async def look_at_experts(self) -> None:
        """Find out which routers can decide over the experts of now, beside other requests: it reads files."""
        self._routers = await asyncio.to_thread(routers_at_hand, self.default, self._library)


def session_of(headers: Any) -> str | None:
    """The session that a request belongs to, by its header `x-session-id`.

    Raises:
        ApiError: if it is longer than anybody needs.
    """
    session = headers.get("x-session-id")
    if session is not None and not 0 < len(session) <= 256:
        raise ApiError(400, "x-session-id must have 1 to 256 characters", found=f"{len(session)}")
    return session or None
