"""What all requests of one server share."""

import asyncio
import random
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorary.errors import LoraryError
from lorary.library.store import Library
from lorary.route.presets import merged
from lorary.route.setting import Routing
from lorary.serve.decision_log import DecisionLog
from lorary.serve.decisions import Decisions
from lorary.serve.engine import Engine
from lorary.serve.metrics import Metrics
from lorary.serve.prompts import Prompts
from lorary.serve.receipt import MOST_REJECTED, constant_weights
from lorary.serve.redact import Redactor
from lorary.serve.router import Routed, Router
from lorary.serve.settings import ServeSettings
from lorary.serve.traffic import Traffic

# Shadow decisions that may be under way; more are left out, since nobody waits for them.
_MOST_SHADOWS = 4


class Server:
    """One library behind an interface.

    Args:
        engine: makes answers.
        library: whose experts are seated in it.
        prompts: writes prompts.
        settings: how it is reached, and what it bounds.
        default: what the library's own name means; the library's default router where None.

    Raises:
        UsageError: if the log cannot be written, a pattern is none, or there is no such shadow router.
        RouterError: if the shadow router cannot run over these experts.
    """

    def __init__(
        self,
        engine: Engine,
        library: Library,
        prompts: Prompts,
        settings: ServeSettings,
        default: Routing | None = None,
    ) -> None:
        default = default or Routing.of(**library.default_router)
        self.engine, self.library, self.prompts, self.settings = engine, library, prompts, settings
        self.router = Router(engine, library, prompts, default)
        self.traffic = Traffic(settings.max_requests)
        self.decisions = Decisions()
        self.metrics = Metrics(engine.load, lambda: len(engine.experts), lambda: self.traffic.number)
        self.started = int(time.time())
        self.change = asyncio.Lock()
        self.start_error: Exception | None = None
        self._redact = Redactor(settings.redact)
        self._shadow = None if settings.shadow is None else merged(default, settings.shadow)
        self._shadows: set[asyncio.Task[None]] = set()
        self._log = None if settings.log is None else DecisionLog(settings.log)

    async def start(self) -> None:
        """Begin to take requests.

        Raises:
            LoraryError: if the shadow router cannot run over these experts.
        """
        try:
            await self.engine.start()
            await self.router.look_at_experts()
            if self._shadow is not None:
                self.engine.check(self._shadow)
        except Exception as error:
            self.start_error = error  # what calls this only says that it failed
            raise
        self.traffic.is_draining = False

    async def look_again(self) -> None:
        """Find out what has become of names, templates and routers, since experts came or went."""
        self.prompts.look_at_experts()
        await self.router.look_at_experts()

    async def stop(self) -> None:
        """End what runs, and close the log."""
        self.traffic.is_draining = True
        for task in self._shadows:
            task.cancel()
        await self.engine.stop(drain=self.settings.drain)
        if self._log is not None:
            self._log.close()

    def record(self, routed: Routed, endpoint: str, prompt: Any, **facts: Any) -> None:
        """Keep a decision, count it, and write it down.

        Args:
            routed: the prompt and who answers it.
            endpoint: that it came by.
            prompt: its text, or ids.
            facts: about the answer.
        """
        receipt = routed.receipt
        if endpoint != "route":  # a dry run answers nothing
            self.metrics.count_decision(receipt)
        shown = replace(receipt, tokens=None, layers=None, rejected=receipt.rejected[:MOST_REJECTED]).to_json()
        entry = {"kind": "decision", "time": round(time.time(), 3), "endpoint": endpoint,
                 "model": routed.asked.target.name, **shown, **facts}  # fmt: skip
        if self.settings.log_prompts:
            entry["prompt"] = self._redact(str(prompt))
        self._keep(entry)

    def report(self, error: BaseException) -> None:
        """Say on stderr where the server failed; a message of its own may hold a prompt, and is left out."""
        place = "".join(traceback.format_tb(error.__traceback__)[-4:])
        print(f"error: {type(error).__name__} in a request\n{place}", file=sys.stderr, flush=True)

    def shadow(self, routed: Sequence[Routed]) -> None:
        """Let the shadow router decide for a share of the prompts, while their answers are made."""
        if self._shadow is None or random.random() >= self.settings.shadow_share:
            return
        for each in routed:
            if each.asked.target.kind in ("library", "router") and len(self._shadows) < _MOST_SHADOWS:
                task = asyncio.create_task(self._decide_beside(each))
                self._shadows.add(task)
                task.add_done_callback(self._shadows.discard)

    async def _decide_beside(self, routed: Routed) -> None:
        assert self._shadow is not None
        asked = replace(routed.asked, target=replace(routed.asked.target, setting=self._shadow), session=None)
        try:
            (other,) = await self.router.route([asked], routed.receipt.id, is_dry=True)
            answered = await self._answered(routed)
        except LoraryError as error:  # its experts may have gone meanwhile
            warnings.warn(f"the shadow router decided nothing: {error.rule}", stacklevel=2)
            return
        receipt = other.receipt
        agrees = receipt.winner == answered
        self.metrics.shadow.labels(receipt.router, str(agrees).lower()).inc()
        self._keep({
            "kind": "shadow", "id": receipt.id, "time": round(time.time(), 3), "router": receipt.router,
            "winner": receipt.winner, "answered": answered, "agrees": agrees,
            "sentence": receipt.sentence,
        })  # fmt: skip

    async def _answered(self, routed: Routed) -> str:
        """The expert with the largest weight in an answer, or what stands in its place."""
        if constant_weights(routed.setting, self.engine.experts) is not None:
            return routed.receipt.winner
        (seen,) = await self.router.route([routed.asked], routed.receipt.id, is_dry=True)
        return seen.receipt.winner

    def _keep(self, entry: dict[str, Any]) -> None:
        self.decisions.add(entry)
        if self._log is not None:
            self._log.write(entry)
