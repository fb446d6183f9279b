"""`lorary evaluate --harness`, run as a user runs it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from harness_tasks import write_forms

Make = Callable[..., Any]


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path, random_adapter: Make, generator: Any) -> Path:
    from lorary.library.store import Library
    from lorary.model.base import load_base

    library = Library.create(tmp_path / "lib", str(tiny_base_folder))
    model = load_base(str(tiny_base_folder)).model
    for name in ("one", "two"):
        library.add_adapter(random_adapter(model, name, generator), {"tasks": ["tiny_arc" if name == "one" else name]})
    return tmp_path / "lib"


@pytest.fixture
def asked(library: Path, tmp_path: Path) -> tuple[object, ...]:
    pytest.importorskip("lm_eval")
    path = write_forms(tmp_path / "forms")
    return "evaluate", library, "tiny_arc,tiny_piqa", "--harness", "--harness-path", path, "--routers", "arrow,uniform"


def test_tasks_of_the_harness_are_scored_under_each_router_and_not_twice(
    library: Path, asked: tuple[object, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run(*asked, "--json")
    assert outcome.code == 0, outcome.err
    first = json.loads(outcome.out)
    cells = first["cells"]
    primary = {(cell["router"], cell["task"]): cell for cell in cells if cell["primary"]}
    assert len(cells) == 12
    assert set(primary) == {(r, t) for r in ("base", "arrow", "uniform") for t in ("tiny_arc", "tiny_piqa")}
    assert all(0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1 and cell["n"] == 3 for cell in primary.values())
    assert {cell["task"]: cell["split"] for cell in cells} == {"tiny_arc": "held_in", "tiny_piqa": "held_out"}

    # As after an interruption: what is not there is computed, what is there is not.
    results = library / "results" / "evaluation.jsonl"
    lines = [line for line in results.read_text().splitlines() if line]
    assert len(lines) == 6
    results.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    from lorary.evaluate import harness

    real, computed = harness.answer_losses, []
    monkeypatch.setattr(harness, "answer_losses", lambda *args: computed.append(1) or real(*args))  # type: ignore[func-returns-value]
    again = json.loads(run(*asked, "--json").out)
    assert len(computed) == 1
    assert [cell["value"] for cell in again["cells"]] == [cell["value"] for cell in cells]

    table = run(*asked)
    assert len(computed) == 1
    assert "tiny_piqa" in table.out
    assert "±" in table.out

    bracketed = run(*asked, "--routers", "arrow[top_k=1,temperature=0.5],arrow[top_k=2]")
    assert bracketed.code == 0, bracketed.err
    assert "arrow[top_k=2]" in bracketed.out
    assert "top_k=1" in bracketed.out


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--raw",), "bring their own rows and metrics"),
        (("--max-length", "8"), "bring their own rows and metrics"),
        (("--routing-rows", "-5"), "bring their own rows and metrics"),
        (("--unsafe-code",), "bring their own rows and metrics"),
        (("--shots", "-1"), "--shots must be at least 0"),
        (("--harness-path", "/no/such/folder"), "--harness-path must be a folder"),
        (("--routers", "arow"), "a router must exist"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: tuple[object, ...], found: str, asked: tuple[object, ...], run: Run
) -> None:
    outcome = run(*asked, *options)
    assert outcome.code in (1, 2)
    assert found in outcome.err


def test_options_of_the_harness_need_the_harness(library: Path, run: Run) -> None:
    outcome = run("evaluate", library, "builtin", "--shots", 2)
    assert outcome.code == 2
    assert "go with --harness" in outcome.err


def test_without_the_package_the_extra_is_named(library: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    for name in ("lorary.evaluate.harness", "lorary.recipes.harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    outcome = run("evaluate", library, "arc_easy", "--harness")
    assert outcome.code == 1
    assert "lorary[harness]" in outcome.err
