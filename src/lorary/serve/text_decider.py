"""Decides by routers that read nothing but text, so that no base model is loaded where another server answers."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorary.data.template import Ids
from lorary.errors import LoraryError, RouterError, UsageError
from lorary.evaluate.decisions import Decision, decisions_of
from lorary.library.store import Library
from lorary.model.decision import Request
from lorary.model.features import TextEmbedding, featured
from lorary.model.plan import fallback_weights
from lorary.model.prepared import read_stored
from lorary.route.setting import Routing
from lorary.serve.engine import Job, Load, Stream, Traced
from lorary.serve.versions import Versions


class TextDecider:
    """An engine that decides and answers nothing; see `lorary.serve.engine.Engine`.

    Args:
        library: the experts.
        tokenizer: of the base.
    """

    def __init__(self, library: Library, tokenizer: Any) -> None:
        self._library, self._tokenizer = library, tokenizer
        self.versions = Versions(library.stamps(), library.stamps, self._change)
        self._watching: asyncio.Task[None] | None = None
        self._take(library.names())

    async def start(self) -> None:
        """Begin to look at the library."""
        self._watching = asyncio.create_task(self.versions.watch())

    async def stop(self, *, drain: float) -> None:
        """Look no more; nothing else runs."""
        if self._watching is not None:
            self._watching.cancel()

    @property
    def is_ready(self) -> bool:
        """Always: nothing is loaded later."""
        return True

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, sorted."""
        return self._names

    def submit(self, job: Job) -> Stream:
        """Refuse a job: another server answers.

        Raises:
            UsageError: always.
        """
        raise UsageError("this process decides and answers nothing", found="a job")

    def check(self, setting: Routing) -> None:
        """Refuse a setting that needs more than the text of a prompt.

        Raises:
            RouterError: if it does, or its data is not prepared.
        """
        if setting.decides != "always":
            self._request(setting)

    async def decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        """Decide for each prompt.

        Raises:
            RouterError: as for `check`.
        """
        return await asyncio.to_thread(self._decide, setting, prompts)

    async def trace(self, setting: Routing, ids: Ids) -> Traced:
        """Refuse: tokens are routed elsewhere.

        Raises:
            RouterError: always.
        """
        raise RouterError("a decision by text says nothing of single tokens", found="trace")

    async def seat(self, name: str) -> None:
        """Take a new adapter of the library into account."""
        await self.versions.seat(name)

    async def unseat(self, name: str) -> None:
        """Leave an adapter out that the library no longer has."""
        await self.versions.unseat(name)

    async def _change(self, removed: Sequence[str], seated: Sequence[str]) -> Mapping[str, Exception]:
        names = sorted({*self._names, *seated} - set(removed))
        try:
            await asyncio.to_thread(self._take, names)
        except LoraryError as error:
            return dict.fromkeys((*removed, *seated), error)
        return {}

    def load(self) -> Load:
        """Decisions are made at once."""
        return Load(0, 0, 0)

    def _take(self, names: Sequence[str]) -> None:
        adapters = [self._library.get(name) for name in names]
        # Experts that do nothing are never chosen.
        self._alive = torch.tensor([any(factors.acts for _, factors in each) for each in adapters])
        self._names = tuple(names)

    @torch.no_grad()
    def _decide(self, setting: Routing, prompts: Sequence[Ids]) -> list[Decision]:
        request = self._request(setting)
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], real[row, : len(prompt)] = torch.tensor(prompt), True
        request.start(real)
        request.see(torch.zeros(*ids.shape, 0), ids)
        request.finish(None)
        return decisions_of(request, self._names)

    def _request(self, setting: Routing) -> Request:
        """What decides by a setting, from what was prepared; made anew for each decision, since it keeps one."""
        if setting.decides != "request" or setting.options.features != "text":
            raise RouterError(
                "without the base model, a router must decide per request by the text alone",
                found=f"router '{setting.router}', features={setting.options.features!r}",
                remedy="--route features=text, with router discriminant, task-predictor or retrieval",
            )
        prepared = read_stored(setting, self._library, self._names)
        by = featured(setting, TextEmbedding(self._tokenizer), self._library, self._names, self._alive, prepared)
        fallback = fallback_weights(setting, self._names)
        return Request(len(self._names), setting.choice(""), "mean", by, setting.router, fallback=fallback)
