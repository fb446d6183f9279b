"""What fails in a study fails alone: the others run, the report is written, and nothing that was made is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from studies import done

from lorary.errors import TaskError
from lorary.library.store import Library
from lorary.recipes.reproduce import StageChoice, run_reproduce
from lorary.study.record import DONE, FAILED
from lorary.train.stack import ExpertStack


def test_a_stage_that_fails_leaves_the_others_to_run(make_study: Callable[..., Path], out: Path) -> None:
    path = str(make_study(("of: private, tasks: 2", "of: private, tasks: [alpha, omega]")))
    result = run_reproduce(path, str(out), choice=StageChoice(until="drift:seed"))
    assert result.failed == ["build:part"]
    assert result.stages["evaluate:main"] == DONE
    row = next(row for row in result.document["stages"] if row["stage"] == "build:part")
    assert row["state"] == FAILED
    assert "omega" in row["error"]


def test_tasks_that_cannot_be_adapted_to_fail_that_stage_alone(make_study: Callable[..., Path], out: Path) -> None:
    change = ("library: private, methods: [lora, mu]", "library: private, tasks: [alpha], methods: [lora, mu]")
    result = run_reproduce(str(make_study(change)), str(out), choice=StageChoice(("build:private", "adapt:few")))
    assert (result.stages["build:private"], result.failed) == (DONE, ["adapt:few"])
    (row,) = [row for row in result.document["stages"] if row["stage"] == "adapt:few"]
    assert "must name held-out tasks" in row["error"]
    path = str(make_study(("of: private, tasks: 2", "of: private, tasks: 9")))
    assert run_reproduce(path, str(out), choice=StageChoice(("build:part",))).failed == ["build:part"]


def test_a_cell_that_cannot_be_scored_is_owed_and_tried_again(
    make_study: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_study())
    run_reproduce(path, str(out), choice=StageChoice(until="build:mbc"))

    def broken(*args: Any, **named: Any) -> None:
        raise TaskError("this must work", found="no")

    monkeypatch.setattr("lorary.evaluate.scorer.score_rows", broken)
    first = run_reproduce(path, str(out), choice=StageChoice(("evaluate",)))
    assert first.failed == ["evaluate:main"]
    assert first.document["failures"]
    (row,) = first.document["unfinished"][:1]
    assert "private/arrow held_in" in row["columns"]
    monkeypatch.undo()
    again = run_reproduce(path, str(out), choice=StageChoice(("evaluate",)))
    assert done(again) == ["evaluate:main"]
    assert not again.document["failures"]


@pytest.mark.parametrize("damage", ["{", "{}"])
def test_damaged_files_of_a_study_are_made_again_from_what_its_libraries_keep(
    make_study: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = str(make_study())
    answers = run_reproduce(path, str(out)).document["answers"]
    for file in (*(out / "results").iterdir(), *(out / "stages").iterdir()):
        file.write_text(damage)

    def unwanted(*args: Any, **named: Any) -> None:
        raise AssertionError("every cell and expert is in a library")

    monkeypatch.setattr("lorary.evaluate.scorer.score_rows", unwanted)
    again = run_reproduce(path, str(out))
    assert not again.failed
    assert again.document["answers"] == answers
    assert not again.document["unfinished"]


def test_a_cause_that_goes_away_costs_no_library(make_study: Callable[..., Path], out: Path) -> None:
    choice = StageChoice(("build:private", "build:other"))
    path = make_study()
    extra = path.parent / "extra.jsonl"
    extra.write_text((path.parent / "tasks.jsonl").read_text())
    path = make_study(("{build: other,", f"{{build: other, data: {extra},"))
    assert done(run_reproduce(str(path), str(out), choice=choice)) == ["build:private", "build:other"]
    extra.rename(out / "away.jsonl")
    failed = run_reproduce(str(path), str(out), choice=choice)
    assert failed.failed == ["build:other"]
    assert (out / "report.html").exists()
    (out / "away.jsonl").rename(extra)
    again = run_reproduce(str(path), str(out), choice=choice)
    (row,) = [row for row in again.document["stages"] if row["stage"] == "build:other"]
    assert (row["state"], row["note"]) == (DONE, "0 experts trained, 4 kept")
    assert not (out / "superseded").exists()


def test_data_that_nobody_asked_for_yet_stop_no_report(make_study: Callable[..., Path], out: Path) -> None:
    path = str(make_study(("{build: other,", "{build: other, data: /nowhere.jsonl,")))
    found = run_reproduce(path, str(out), choice=StageChoice(until="build:private"))
    assert done(found) == ["build:private"]
    assert {row["stage"]: row["plain"] for row in found.document["stages"]}["build:other"] is None


@pytest.mark.parametrize("damaged", ["library.json", "adapters/beta/provenance.json"])
def test_a_damaged_library_fails_its_stage_and_leaves_the_others(
    make_study: Callable[..., Path], out: Path, damaged: str
) -> None:
    path, choice = str(make_study()), StageChoice(("build:private", "build:part", "build:other"))
    run_reproduce(path, str(out), choice=StageChoice(("build:private", "build:other")))
    file = out / "libraries" / "other" / damaged
    whole = file.read_bytes()
    file.write_text("{")
    found = run_reproduce(path, str(out), choice=choice)
    assert found.failed == ["build:other"]
    assert done(found) == ["build:part"]
    assert [row["library"] for row in found.document["libraries"]] == ["private", "part"]
    file.write_bytes(whole)
    assert not run_reproduce(path, str(out), choice=choice).failed
    assert not (out / "superseded").exists()


def test_a_part_that_holds_other_experts_is_refused_by_name(make_study: Callable[..., Path], out: Path) -> None:
    path, choice = str(make_study()), StageChoice(("build:private", "build:part", "build:other"))
    run_reproduce(path, str(out), choice=choice)
    part = Library.open(out / "libraries" / "part")
    part.remove("alpha")
    part.add(out / "libraries" / "other" / "adapters" / "alpha")
    found = run_reproduce(path, str(out), choice=choice)
    assert found.failed == ["build:part"]
    errors = {row["stage"]: row["error"] for row in found.document["stages"]}
    assert "byte for byte\nfound: another alpha\nremedy: lorary library remove" in errors["build:part"]
    part.remove("alpha")
    assert not run_reproduce(path, str(out), choice=choice).failed


def test_memory_that_runs_out_fails_one_stage(
    make_study: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = ExpertStack.__init__

    def too_large(self: ExpertStack, num_slots: int, targets: Any, rank: int, *rest: Any) -> None:
        if rank == 1000:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        make(self, num_slots, targets, rank, *rest)

    monkeypatch.setattr(ExpertStack, "__init__", too_large)
    path = str(make_study(("train: {seed: 1}", "train: {rank: 1000}")))
    found = run_reproduce(path, str(out), choice=StageChoice(("build",)))
    assert found.failed == ["build:other"]
    assert done(found) == ["build:private", "build:mbc", "build:part"]
