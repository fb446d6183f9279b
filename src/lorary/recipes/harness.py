"""`lorary evaluate --harness`: tasks of lm-evaluation-harness on a library under several routers, beside the base."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from lorary.data.chat import chat_frame, warn_of_dates
from lorary.display import Bar, Display
from lorary.errors import LibraryError, UsageError
from lorary.evaluate.base_key import content_of_base
from lorary.evaluate.cache import ResultCache
from lorary.evaluate.cells import ORACLE
from lorary.evaluate.harness import HarnessModel, evaluate_tasks, load_tasks
from lorary.evaluate.harness_cells import HarnessCell, cells_of, choose_primary
from lorary.evaluate.settings import EvaluateSettings
from lorary.evaluate.summary import Summary
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import Routing, attach, detach, routing
from lorary.model.base import Base, load_base
from lorary.model.prepared import prepared_marks
from lorary.numbers import check_count
from lorary.route.presets import in_units, without_router


@dataclass(frozen=True)
class HarnessResult:
    """All cells, in the order of routers and tasks, and the tasks on which the base beats a router."""

    cells: list[HarnessCell]
    library: str
    base: str
    settings: Mapping[str, Any]

    @property
    def guard(self) -> list[dict[str, Any]]:
        """Every task on which the base alone beats a router, by name."""
        return Summary(self.cells).base_guard()

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        cells = [{key: value for key, value in asdict(cell).items() if key != "values"} for cell in self.cells]
        versions = {"lm_eval": version("lm_eval"), "lorary": version("lorary")}
        return {
            "library": self.library, "base": self.base, "settings": dict(self.settings), "versions": versions,
            "cells": cells, "base_guard": self.guard,
        }  # fmt: skip


def run_harness(
    library_path: str,
    names: Sequence[str],
    *,
    routers: Sequence[str],
    include_path: str | None = None,
    rows: int | None = None,
    shots: int | None = None,
    template: str | None = None,
    route: Mapping[str, Any] | None = None,
    base: str | None = None,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    display: Display | None = None,
) -> HarnessResult:
    """Load a library, its base and tasks of the harness, and evaluate; answers that are there are not computed again.

    Args:
        library_path: folder of the library.
        names: of tasks, groups or tags of the harness.
        routers: names of routers; `base` is always among them, and an oracle cannot be.
        include_path: folder of tasks that the harness does not bring itself.
        rows: the first so many of each task; all where None.
        shots: examples in each prompt; the task's own number where None.
        template: `plain` (the task's prompts as they are) or `chat` (in the base's chat template); must be the one the
            experts were trained with.
        route: fields of `Routing`, in place of those of the library's default router.
        base: the base model to load; the library's own where None.
        force_base: accept unrelated weights of the same shapes.
        device: where to run.
        dtype: of the base.
        display: where progress is shown.

    Returns:
        The cells.

    Raises:
        UsageError: if no task is named, or a number is out of range.
        LibraryError: if the library is empty, or its experts were trained with another template.
        TaskError: if a task is unknown, does not load, or runs code that a model wrote.
    """
    display = display or Display()
    _check(names, include_path, rows, shots)
    library = Library.open(library_path)
    if not library.names():
        raise LibraryError(f"library '{library.path}' must hold an adapter to be evaluated", found="none")
    settings = _settings(library, routers, route or {}, display)
    chat = template_of(library, template) == "chat"
    with _quiet():
        tasks = load_tasks(names, include_path)
        loaded = load_base(base_of(library, base), dtype=dtype, device=device)
        run = _Run(loaded, library, settings, tasks, display, rows, shots, chat)
        attach(loaded.model, library, router="base", tokenizer=loaded.tokenizer, force_base=force_base)
        try:
            cells = choose_primary([cell for router in settings.routers for cell in run.cells(router)])
        finally:
            detach(loaded.model)
    asked = {"tasks": list(names), "rows": rows, "shots": shots, "template": "chat" if chat else "plain"}
    routed = {router: settings.setting(router).to_json() for router in settings.routers}
    return HarnessResult(cells, library.name, loaded.files.name, {**asked, "routers": routed})


@dataclass
class _Run:
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
        self._held_in = {task for row in self.library.describe() for task in row["tasks"]}

    def cells(self, router: str) -> list[HarnessCell]:
        """One router on all tasks; which metric counts is not chosen yet."""
        setting = self.settings.setting(router)
        seconds: dict[str, float] = {}
        with (
            self.display.bar(f"{router} on tasks of the harness", len(self.tasks["tasks"])) as bar,
            routing(self.base.model, setting),
        ):
            model = HarnessModel(self.base.model, self.base.tokenizer, self._recall(setting, seconds, bar))
            found = evaluate_tasks(model, self.tasks, rows=self.rows, shots=self.shots, chat=self.chat)
        labels = {
            "library": self.library.name, "router": router, "template": "chat" if self.chat else "plain",
            "prefix": self._prefix,
        }  # fmt: skip
        return cells_of(found, seconds, self._held_in, **labels)

    def _recall(self, setting: Routing, seconds: dict[str, float], bar: Bar) -> Callable[..., list[Any]]:
        """Answers out of the library's results, keyed by all that decides them, the very requests included."""
        model = self.base.model
        conditions = {
            "routing": setting.to_json(), "prepared": prepared_marks(setting, self.library),
            "device": model.device.type, "dtype": str(model.dtype), "lm_eval": version("lm_eval"),
        }  # fmt: skip

        def recall(kind: str, task: str, requests: Sequence[Any], compute: Callable[[], list[Any]]) -> list[Any]:
            asked = hashlib.sha256(json.dumps(requests, default=str).encode()).hexdigest()
            key = self._cache.key(harness=kind, requests=asked, **conditions)
            found = self._cache.get(key)
            if found is None:
                started = time.perf_counter()
                found = {"answers": compute(), "seconds": time.perf_counter() - started}
                self._cache.put(key, found)
            if task not in seconds:
                bar.advance(task)
            seconds[task] = seconds.get(task, 0.0) + found["seconds"]
            return list(found["answers"])

        return recall


def _settings(library: Library, routers: Sequence[str], route: Mapping[str, Any], display: Display) -> EvaluateSettings:
    """The routers' settings, as `lorary evaluate` makes them; without the oracle, who needs a task's other rows."""
    if ORACLE in routers:
        display.say("oracle: left out, it is for tasks with rows to choose an expert by")
    default = Routing(**library.default_router)
    asked = without_router(default) | dict(route)
    own = {key: asked.pop(key) for key in ("top_k", "temperature", "mix")}
    known = tuple(dict.fromkeys(("base", *(router for router in routers if router != ORACLE))))
    return EvaluateSettings(routers=known, route=asked, units=in_units(default), **own)


def _check(names: Sequence[str], include_path: str | None, rows: int | None, shots: int | None) -> None:
    if not names:
        raise UsageError("tasks of the harness must be named", found="none", remedy="for example arc_easy,piqa")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError("--harness-path must be a folder of tasks", found=include_path)
    for option, value, least in (("--rows", rows, 1), ("--shots", shots, 0)):
        if value is not None:
            check_count(option, value, least=least)


@contextmanager
def _quiet() -> Iterator[None]:
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
