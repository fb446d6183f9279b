"""Tasks of lm-evaluation-harness on a library under several routers, beside the base."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import datasets

from lorary.data.chat import chat_frame, warn_of_dates
from lorary.display import Bar, Display
from lorary.evaluate.base_key import content_of_base
from lorary.evaluate.cache import ResultCache
from lorary.evaluate.harness import HarnessModel, evaluate_tasks
from lorary.evaluate.harness_cells import HarnessCell, cells_of
from lorary.evaluate.recorded_tasks import tasks_of
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.store import Library
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.prepared import prepared_marks
from lorary.route.presets import in_units, without_router
from lorary.route.setting import Routing
from lorary.route.spec import REFERENCES


@dataclass
class HarnessRun:
    """Routers one after the other over the same tasks."""

    base: Base
    library: Library
    settings: EvaluateSettings
    tasks: Mapping[str, Any]
    display: Display
    rows: int | None
    shots: int | None
    chat: bool

    def __post_init__(self) -> None:
        self._cache = ResultCache(self.library, content_of_base(self.base))
        self._prefix = ""
        if self.chat and getattr(self.base.tokenizer, "chat_template", None):
            frame = chat_frame(self.base.tokenizer)
            warn_of_dates(frame)
            self._prefix = frame.prefix
        self._held_in = {task for row in self.library.describe() for task in tasks_of(row)}

    def cells(self, router: str) -> list[HarnessCell]:
        """One router on all tasks; which metric counts is not chosen yet."""
        setting = self.settings.setting(router)
        seconds: dict[str, float] = {}
        with (
            self.display.bar(f"{router} on tasks of the harness", len(self.tasks["tasks"])) as bar,
            routing(self.base.model, setting),
        ):
            model = HarnessModel(self.base.model, self.base.tokenizer, self._recall(setting, seconds, bar))
            report = evaluate_tasks(model, self.tasks, rows=self.rows, shots=self.shots, chat=self.chat)
        labels = {
            "library": self.library.name, "router": router, "template": "chat" if self.chat else "plain",
            "prefix": self._prefix,
        }  # fmt: skip
        return cells_of(report, seconds, self._held_in, **labels)

    def _recall(self, setting: Routing, seconds: dict[str, float], bar: Bar) -> Callable[..., list[Any]]:
        """Answers out of the library's results, keyed by all that decides them, the very requests included."""
        model = self.base.model
        conditions = {
            "routing": setting.to_json(), "prepared": prepared_marks(setting, self.library),
            "device": model.device.type, "dtype": str(model.dtype), "lm_eval": version("lm_eval"),
            **({"editions": setting.editions} if setting.editions else {}),
        }  # fmt: skip

        def recall(kind: str, task: str, requests: Sequence[Any], compute: Callable[[], list[Any]]) -> list[Any]:
            digest = hashlib.sha256(json.dumps(requests, default=str).encode()).hexdigest()
            key = self._cache.key(harness=kind, requests=digest, **conditions)
            cached = self._cache.get(key)
            if cached is None:
                started = time.perf_counter()
                cached = {"answers": compute(), "seconds": time.perf_counter() - started}
                self._cache.put(key, cached)
            if task not in seconds:
                bar.advance(task)
            seconds[task] = seconds.get(task, 0.0) + cached["seconds"]
            return list(cached["answers"])

        return recall


def harness_settings(
    library: Library, routers: Sequence[str], route: Mapping[str, Any], display: Display
) -> EvaluateSettings:
    """The routers' settings, as `lorary evaluate` makes them; without the oracle, who needs a task's other rows."""
    for router in (name for name in REFERENCES if name in routers):
        display.say(f"{router}: left out, it is for tasks with rows to choose an expert by")
    default = Routing.of(**library.default_router)
    fields = without_router(default) | dict(route)
    choice = {str(key): fields.pop(key) for key in ("top_k", "temperature", "mix") if key in fields}
    names = tuple(dict.fromkeys(("base", *(router for router in routers if router not in REFERENCES))))
    return EvaluateSettings(routers=names, route=fields, units=in_units(default), **choice)


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Silence what the harness says of its own doings, and the bars of the data sets it loads."""
    logger, had_bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    before = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        if had_bars:
            datasets.enable_progress_bars()
