"""Progress where stderr is no terminal."""

import pytest

from lorary.recipes import display


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
