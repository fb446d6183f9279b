"""Progress where stderr is no terminal."""

import io
import re

import pytest

from lorary import display
from lorary.build.progress import TrainingBar
from lorary.train.units import TrainedUnit


def test_the_time_left_counts_only_what_this_run_has_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    monkeypatch.setattr(display, "LINE_EVERY_S", 1.0)
    with display.Display().bar("training", 20) as bar:
        for done in (11, 13):  # ten of twenty were done by a run before; units may end several at a time
            now += 5.0
            bar.advance_to(done)
    assert capsys.readouterr().err.splitlines() == ["training: 11/20", "training: 13/20, 18 s left"]


def test_a_line_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with display.Display().bar("evaluating [bold]", 1) as bar:
        bar.advance("[/b] x")
    assert capsys.readouterr().err == "evaluating [bold]: 1/1 [/b] x\n"


def test_steps_that_an_expert_was_spared_do_not_count_as_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    monkeypatch.setattr(display, "LINE_EVERY_S", 1.0)
    with display.Display().bar("training", 200) as bar:
        watch = TrainingBar(bar, {"a": 100, "b": 100}, [])
        for step in (1, 11):
            now += 10.0
            watch.on_step({"a": step}, {"a": 1.0}, 10, 1.0)
        watch.on_finish(TrainedUnit("a", {}, {}, [1.0] * 11, [(0, 1.0), (11, 2.0)], 0, True))
        now += 10.0
        watch.on_step({"b": 10}, {"b": 1.0}, 10, 1.0)
    assert [re.sub(r" ./2 experts.*", "", line) for line in capsys.readouterr().err.splitlines()] == [
        "training: 1/200", "training: 11/200, 189 s left", "training: 21/111, 90 s left"
    ]  # fmt: skip


def test_a_bar_inside_of_another_is_a_line_below_it_and_goes_again() -> None:
    file = io.StringIO()
    shown = display.Display()
    shown.console = display.PrintableConsole(file=file, force_terminal=True, width=100)
    other = display.Display()
    other.console = shown.console
    with shown.bar("outer", 2) as outer:
        with other.bar("inner", 3) as inner:
            inner.advance()
            assert outer._progress is inner._progress
            assert [task.description for task in outer._progress.tasks] == ["outer", "inner"]  # type: ignore[union-attr]
        assert [task.description for task in outer._progress.tasks] == ["outer"]  # type: ignore[union-attr]
        outer.advance_to(2)
    assert "outer" in file.getvalue()
    with other.bar("next", 1) as bar:
        assert bar._progress is not outer._progress
