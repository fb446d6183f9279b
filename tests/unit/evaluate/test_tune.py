"""A library's default router is chosen on validation rows, with and without the task's expert."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError
from lorary.evaluate import scorer, tune
from lorary.evaluate.answers import RowScores
from lorary.evaluate.evaluation import ScoredCells
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.store import Library
from lorary.model.base import Base

SETTINGS = EvaluateSettings(routers=("arrow", "uniform"), rows=2, routing_rows=0)


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    """Tasks a, b and c; only c has no validation rows."""
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"task": name, "split": split, "source": f"{name} {i} {split}:", "target": "up"}
        for name in "abc"
        for split in ("train", "val", "test")
        for i in range(3)
        if (name, split) != ("c", "val")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_tasks(path)


@pytest.fixture
def library(tmp_path: Path, base: Base, random_adapter: Callable[..., Any], generator: torch.Generator) -> Library:
    library = Library.create(tmp_path / "lib", base.model, base_name="tiny")
    for name in "abc":
        library.add_adapter(random_adapter(base.model, name, generator), {"tasks": [name]})
    return library


def test_each_task_is_scored_with_its_expert_and_without_on_no_test_row(
    monkeypatch: pytest.MonkeyPatch, base: Base, library: Library, tasks: dict[str, Task]
) -> None:
    seen: list[tuple[str, tuple[str, ...], Any]] = []
    real = tune.Scorer.score

    def score(self: Any, task: Task, router: str, scored: ScoredCells) -> Any:
        sources = tuple(row.source for row in task.split("test"))
        seen.append((task.name, sources, self._settings.setting(router).allow))
        return real(self, task, router, scored)

    monkeypatch.setattr(tune.Scorer, "score", score)
    tuned = tune.tune_library(base, library, tasks, SETTINGS)
    for name in "abc":
        split = "train" if name == "c" else "val"
        rows = (f"{name} 0 {split}:", f"{name} 1 {split}:")
        others = [other for other in "abc" if other != name]
        assert [call[1:] for call in seen if call[0] == name] == [(rows, None), (rows, others)] * 2
    assert not hasattr(base.model, "_lorary")
    assert Library.open(library.path).default_router == tuned.router
    assert {candidate.router for candidate in tuned.candidates} == {"arrow", "uniform"}
    evidence = json.loads(next((library.path / "derived").rglob("tuned.json")).read_text())
    assert evidence["candidates"][0]["router"] == tuned.router["router"]


def test_the_best_mean_of_both_wins_and_the_first_of_equal_ones(
    monkeypatch: pytest.MonkeyPatch, base: Base, library: Library, tasks: dict[str, Task]
) -> None:
    values = {"arrow": 0.4, "uniform": 0.6, "norm": 0.6}
    monkeypatch.setattr(tune, "_means", lambda _scored, _routers: values)
    settings = EvaluateSettings(routers=("arrow", "uniform", "norm"), rows=1, routing_rows=0)
    tuned = tune.tune_library(base, library, tasks, settings)
    assert [candidate.router for candidate in tuned.candidates] == ["uniform", "norm", "arrow"]
    assert library.default_router["router"] == "uniform"


def test_tasks_of_no_expert_are_refused_and_nothing_is_written(
    base: Base, library: Library, tasks: dict[str, Task]
) -> None:
    before = library.default_router
    with pytest.raises(TaskError, match="none among"):
        tune.tune_library(base, library, {}, SETTINGS)
    assert library.default_router == before


def test_a_reference_that_is_told_the_task_is_no_candidate(
    base: Base, library: Library, tasks: dict[str, Task]
) -> None:
    with pytest.raises(UsageError, match=r"candidates for a default must be routers.*\nfound: oracle"):
        tune.tune_library(base, library, tasks, replace(SETTINGS, routers=("arrow", "oracle")))


def test_the_base_as_a_candidate_counts_in_the_template_that_other_rows_choose(
    base: Base, library: Library, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    first = {row.source for task in tasks.values() for row in (task.split("val") or task.split("train"))[:2]}

    def fake(model: Any, tokenizer: Any, template: Any, rows: Any, metric: Any, **more: Any) -> RowScores:
        # Chat is right on the rows that are scored, and wrong on those that choose.
        right = float((template.name == "chat") == (rows[0].source in first))
        return RowScores([1.0] * len(rows), metric.name, [right] * len(rows), [""] * len(rows))

    monkeypatch.setattr(scorer, "score_rows", fake)
    settings = replace(SETTINGS, routers=("base", "uniform"))
    tuned = tune.tune_library(replace(base, tokenizer=tokenizer), library, tasks, settings)
    (found,) = [candidate for candidate in tuned.candidates if candidate.router == "base"]
    assert (found.known, found.masked) == (0.0, 0.0)
