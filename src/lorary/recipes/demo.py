"""`lorary demo`: the whole idea on the embedded base model and builtin tasks, in minutes."""

import io
import json
import os
import shlex
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorary.build.build_library import BuildResult, build_library
from lorary.build.settings import BuildSettings
from lorary.cores import free_threads
from lorary.data.builtin.catalogue import DEMO_TASKS, builtin_tasks
from lorary.data.schema import Task
from lorary.display import Display
from lorary.errors import UsageError
from lorary.evaluate.cells import BASE, ORACLE
from lorary.evaluate.evaluate_library import evaluate_library
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.routed_prompt import RoutedPrompt, trace_prompt
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.files import replace_file
from lorary.library.opening import open_or_create
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import Base, load_base
from lorary.prepare.prepare_library import prepare_built
from lorary.report.evaluation_page import report_of, write_report
from lorary.report.tables import print_evaluation
from lorary.route.presets import in_units
from lorary.route.setting import Routing

# Adapters in the upper layers only and few steps, so that the quick demo ends in minutes on two cores.
QUICK = BuildSettings(steps=24, upper_layers=15, evals=2, val_rows=16)
ROUTERS = ("base", "uniform", "arrow", "auto", "oracle")
QUICK_EVALUATION = EvaluateSettings(ROUTERS, rows=20, oracle_rows=8)
FULL = BuildSettings(steps=100)
FULL_EVALUATION = EvaluateSettings(ROUTERS, rows=40)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Args:
        build: what was trained.
        evaluation: routers on held-in and held-out tasks.
        traced: one prompt of each family, its answer and how it was routed.
        library: path of the library.
        report: path of the page.
        seconds: time by stage.
    """

    build: BuildResult
    evaluation: Evaluation
    traced: list[RoutedPrompt]
    library: str
    report: str
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {
            **self.evaluation.to_json(),
            "val_losses": self.build.val_losses,
            "library_path": self.library,
            "report": self.report,
            "generations": [{"prompt": traced.prompt, "answer": traced.answer} for traced in self.traced],
            "seconds": self.seconds,
        }


def run_demo(out: str, *, full: bool = False, quiet: bool = False) -> DemoResult:
    """Train a private library on builtin tasks, route it, evaluate it and write a report. Rerunning goes on.

    Args:
        out: folder for `library/`, `results.json` and `report.html`.
        full: all builtin tasks and all layers in place of the quick selection.
        quiet: print no table.

    Returns:
        Everything that was made.

    Raises:
        UsageError: if `out` is a file.
        BaseModelError: if the embedded base model is not installed.
    """
    display, folder = Display(), Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError("--out must be a folder", found=f"'{out}' is a file")
    train, held_out = demo_tasks(full)
    display.say(choose_threads())
    seconds: dict[str, float] = {}
    watch = _Stopwatch(seconds)
    display.say("1/4 base model: SmolLM2-135M-Instruct")
    base = load_base("embedded")
    library = open_or_create(str(folder / "library"), "embedded")
    watch.lap("base")
    display.say(f"2/4 training {len(train)} experts, one per task")
    built = build_library(base, library, train, FULL if full else QUICK, display=display)
    prepare_built(base, library, train, display=display)
    watch.lap("train")
    display.say(f"3/4 evaluating on {len(train)} held-in and {len(held_out)} held-out tasks")
    default = Routing.of(**library.default_router)
    settings = replace(FULL_EVALUATION if full else QUICK_EVALUATION, units=in_units(default))
    evaluation = evaluate_library(base, library, {**train, **held_out}, settings, display=display)
    watch.lap("evaluate")
    display.say("4/4 report")
    traced = _trace(base, library, train, evaluation)
    report = folder / "report.html"
    write_report(report, report_of(evaluation, [library], traced))
    watch.lap("report")
    result = DemoResult(built, evaluation, traced, str(library.path), str(report), seconds)
    results = folder / "results.json"
    replace_file(results, json.dumps(result.to_json(), indent=1).encode(), results.with_suffix(".tmp"))
    with redirect_stdout(io.StringIO() if quiet else sys.stdout):
        _print(result)
    return result


def choose_threads() -> str:
    """Let torch have a thread for each core that nothing else uses; with more it would be far slower.

    Returns:
        What was chosen, in words; `OMP_NUM_THREADS` chooses in its place.
    """
    if asked := os.environ.get("OMP_NUM_THREADS"):
        return f"threads: {asked} (OMP_NUM_THREADS)"
    threads, cores = free_threads()
    torch.set_num_threads(threads)
    used = cores - threads
    return f"threads: {threads} of {cores} cores" + (f", {used} of which other work uses now" if used else "")


def demo_tasks(full: bool) -> tuple[dict[str, Task], dict[str, Task]]:
    """Tasks to train on and held-out tasks, by name."""
    tasks = builtin_tasks()
    train = {n: t for n, t in tasks.items() if t.role == "train" and (full or n in DEMO_TASKS)}
    return train, {n: t for n, t in tasks.items() if t.role == "heldout"}


def _trace(base: Base, library: Library, train: dict[str, Task], evaluation: Evaluation) -> list[RoutedPrompt]:
    """Route a prompt of each family by the best router: the first of its first task that was answered rightly."""
    routers = [router for router in evaluation.settings.routers if router not in (BASE, "uniform", ORACLE)]
    best = max(routers, key=lambda router: evaluation.mean(router, "held_in") or 0.0)
    scores = {cell.task: cell.values for cell in evaluation.cells if cell.primary and cell.router == best}
    first_of_family = {task.family: task for task in reversed(train.values())}
    rows = []
    for _, task in sorted(first_of_family.items()):
        tested = task.split("test")
        right = (row for row, score in zip(tested, scores.get(task.name, ()), strict=False) if score == 1)
        rows.append(next(right, tested[0]))
    setting = evaluation.settings.setting(best)
    attach(base.model, library, router=BASE, tokenizer=base.tokenizer)
    try:
        return [trace_prompt(base, row.source, "plain", setting, max_new_tokens=8, references=row.references)
                for row in rows]  # fmt: skip
    finally:
        detach(base.model)


def _print(result: DemoResult) -> None:
    print_evaluation(result.evaluation)
    print("\nanswers of the routed model:")
    for traced in result.traced:
        print(f"  {traced.prompt!r} -> {traced.answer!r}")
    print(f"library: {result.library}\nreport: {result.report}")
    stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    print(f"time: {sum(result.seconds.values()):.0f} s ({stages})")
    command = sys.argv[0] if Path(sys.argv[0]).name == "lorary" else "lorary"  # as the caller called it
    print(f"serve it: {command} serve {shlex.quote(result.library)}")


class _Stopwatch:
    """Notes the seconds since the last lap."""

    def __init__(self, laps: dict[str, float]) -> None:
        self._laps, self._last = laps, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name], self._last = round(now - self._last, 2), now
