"""Routers that decide for whole requests: their settings stay ready, and calls that ask alike share passes."""

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from lorary.data.template import Ids
from lorary.evaluate.decisions import Decision, decide
from lorary.model.attach import routing
from lorary.route.setting import Routing

# Settings that are kept ready.
MOST_READY = 8


@dataclass(eq=False)
class Asked:
    """A call that waits for decisions.

    Args:
        setting: that decides.
        prompts: still to be decided for.
        answer: where the decisions go.
        decisions: of the prompts before.
    """

    setting: Routing
    prompts: list[Ids]
    answer: asyncio.Future[list[Decision]]
    decisions: list[Decision] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Calls with the same one can be answered together."""
        return json.dumps(self.setting.to_json(), sort_keys=True)


class Deciding:
    """A block inside of which routers decide for requests, in the thread that entered it.

    Each setting has a `lorary.routing` block of its own, open in a context of its own.

    Args:
        model: a routed model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ready: OrderedDict[str, tuple[Context, AbstractContextManager[Any]]] = OrderedDict()

    def __enter__(self) -> "Deciding":
        return self

    def __exit__(self, *_error: object) -> None:
        while self._ready:
            self._close()

    def step(self, asked: "deque[Asked]", most_tokens: int, answer: Callable[[asyncio.Future[Any], Any], None]) -> None:
        """Decide for the prompts that fit one pass, of the call that came first and of those that ask the same.

        Args:
            asked: calls that wait; those that are answered are taken off.
            most_tokens: of one pass; a longer prompt goes alone.
            answer: is given what each call waits for, and the decisions or an error.
        """
        while asked and asked[0].answer.cancelled():
            asked.popleft()
        if not asked:
            return
        key = asked[0].key
        alike = [call for call in tuple(asked) if call.key == key and not call.answer.cancelled()]
        batch: list[tuple[Asked, Ids]] = []
        for call in alike:
            for ids in call.prompts:
                if batch and (len(batch) + 1) * max(len(ids), *(len(other) for _, other in batch)) > most_tokens:
                    break
                batch.append((call, ids))
        try:
            decisions = self._decide(key, alike[0].setting, [ids for _, ids in batch])
        except Exception as error:  # of these calls alone
            for call in alike:
                asked.remove(call)
                answer(call.answer, error)
            return
        for (call, ids), decision in zip(batch, decisions, strict=True):
            call.prompts.remove(ids)
            call.decisions.append(decision)
        for call in alike:
            if not call.prompts:
                asked.remove(call)
                answer(call.answer, call.decisions)

    def _decide(self, key: str, setting: Routing, prompts: list[Ids]) -> list[Decision]:
        if key not in self._ready:
            context, block = copy_context(), routing(self._model, setting)
            context.run(block.__enter__)
            self._ready[key] = (context, block)
        self._ready.move_to_end(key)
        while len(self._ready) > MOST_READY:
            self._close()
        return self._ready[key][0].run(decide, self._model, prompts)

    def _close(self) -> None:
        context, block = self._ready.popitem(last=False)[1]
        context.run(block.__exit__, None, None, None)
