"""`lorary demo` on the embedded base model, cut down to seconds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.library.store import Library


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks, one step, one layer: the same story with less in it."""
    from lorary.recipes import demo

    tasks = demo.builtin_tasks()
    chosen = {name: tasks[name] for name in ("last_word", "sentiment", "second_word")}
    monkeypatch.setattr(demo, "builtin_tasks", lambda: chosen)
    monkeypatch.setattr(demo, "QUICK", replace(demo.QUICK, steps=1, upper_layers=1, evals=1, val_rows=2, batch_size=2))
    monkeypatch.setattr(demo, "QUICK_EVALUATION", replace(demo.QUICK_EVALUATION, rows=2, oracle_rows=2))


@pytest.mark.usefixtures("embedded_cache", "small")
def test_the_demo_builds_evaluates_and_reports_and_a_rerun_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.recipes import demo

    # Interrupted in the middle of the evaluation ...
    score: Any = demo.evaluate_library
    monkeypatch.setattr(demo, "evaluate_library", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(str(tmp_path / "out"))
    monkeypatch.setattr(demo, "evaluate_library", score)
    # ... it goes on without training again.
    result = demo.run_demo(str(tmp_path / "out"))
    assert result.build.trained == []
    assert result.build.kept == ["last_word", "sentiment"]

    document = json.loads((tmp_path / "out" / "results.json").read_text())
    primary = [(c["router"], c["task"]) for c in document["cells"] if c["primary"]]
    routers, tasks = ("base", "uniform", "arrow", "auto", "oracle"), ("last_word", "sentiment", "second_word")
    assert sorted(primary) == sorted((router, task) for router in routers for task in tasks)
    assert {c["template"] for c in document["cells"] if c["router"] == "base"} == {"plain", "chat"}
    assert {c["split"] for c in document["cells"] if c["task"] == "second_word"} == {"held_out"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "</html>" in page
    assert "last_word" in page
    assert Library.open(tmp_path / "out" / "library").verify() == []
    out = capsys.readouterr().out
    assert "held-in tasks" in out
    assert "answers of the routed model:" in out
