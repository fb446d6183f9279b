"""Threads are as many as cores that nothing else uses."""

import os
from pathlib import Path

import pytest

from lorary import cores

BEFORE = (
    "cpu  300 0 0 300 0 0 0 0 0 0\ncpu0 100 0 0 100 0 0 0 0 0 0\ncpu1 100 0 0 100 0 0 0 0 0 0\ncpu2 7 0 0 7\nintr 1 2"
)
# Core 0 works all the time, core 1 a tenth of it, core 2 waits for a disk.
AFTER = "cpu  410 0 0 410 0 0 0 0 0 0\ncpu0 140 0 60 100 0 0 0 0 0 0\ncpu1 110 0 0 190 0 0 0 0 0 0\ncpu2 7 0 0 8 99\n"


@pytest.mark.parametrize(("chosen", "busy"), [((0, 1, 2), 1.1), ((0,), 1.0), ((1, 2), 0.1), ((5,), 0.0)])
def test_busy_cores_are_those_that_work_of_those_that_count(chosen: tuple[int, ...], busy: float) -> None:
    assert cores.busy_cores(BEFORE, AFTER, chosen) == pytest.approx(busy)
    assert cores.busy_cores(BEFORE, BEFORE, chosen) == 0


@pytest.mark.parametrize(("available", "threads"), [({0, 1, 2}, 2), ({0}, 1), ({1, 2}, 2)])
def test_there_is_a_thread_for_each_core_without_work_and_always_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, available: set[int], threads: int
) -> None:
    texts = iter([BEFORE, AFTER])
    monkeypatch.setattr(cores, "STAT", tmp_path / "stat")
    monkeypatch.setattr(Path, "read_text", lambda _path: next(texts))
    monkeypatch.setattr(cores.time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: available)
    assert cores.free_threads() == (threads, len(available))


def test_where_cores_cannot_be_watched_the_load_of_the_machine_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cores, "STAT", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    monkeypatch.setattr(os, "getloadavg", lambda: (2.6, 0.0, 0.0))
    assert cores.free_threads() == (5, 8)
