"""A study runs stage by stage, goes on where it was killed, and does again only what hangs on what has changed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from studies import done

from lorary.errors import LibraryError, LoraryError, TaskError, UsageError
from lorary.library.lock import study_lock
from lorary.library.store import Library
from lorary.recipes.reproduce import StageChoice, run_reproduce
from lorary.study.context import OutOfTime
from lorary.study.record import DONE

ALL = ("build:private", "build:mbc", "evaluate:main", "build:part", "build:other", "drift:seed", "adapt:few")


def test_a_study_runs_every_stage_once_and_answers_its_questions(make_study: Callable[..., Path], out: Path) -> None:
    path = str(make_study())
    first = run_reproduce(path, str(out))
    assert done(first) == list(ALL)
    assert Library.open(out / "libraries" / "part").names() == ["alpha", "beta"]
    document = json.loads((out / "report.json").read_text())
    assert document["unfinished"] == document["failures"] == []
    assert document["overlap"] == ["overlap with held-out tasks: none"]
    answers = {answer["ask"]: answer for answer in document["answers"]}
    (held_in, held_out) = answers["Which is better?"]["rows"]
    assert (held_in["tasks"], held_in["rows"], held_out["tasks"]) == (4, 16, 1)
    assert held_in["stages"] == ["evaluate:main"]
    assert len(answers["Does a library help?"]["rows"]) == 2
    assert "adjusted Rand index" in answers["What does a seed move?"]["lines"][1]
    # Equal training examples: 4 x 3 steps of 2 rows, and of clusters 2 x 3.
    spent = {row["library"]: (row["experts"], row["steps"], row["examples"]) for row in document["libraries"]}
    assert spent["private"] == (4, 12, 24)
    assert spent["mbc"] == (2, 6, 12)
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "Which is better?" in text
        assert "lorary build" in text
    second = run_reproduce(path, str(out))
    assert done(second) == []
    assert set(second.stages.values()) == {"skipped"}
    _changes_do_again_only_what_hangs_on_them(make_study, out)


def test_held_out_sets_with_a_name_are_reported_apart(make_study: Callable[..., Path], out: Path) -> None:
    whole = "held_out: {reference: %s, names: [omega]}"
    sets = "held_out: [{name: one, reference: %s, names: [omega]}, {name: two_b, reference: %s, names: [delta]}]"
    path = make_study(("names: [alpha, beta, gamma, delta]}", "names: [alpha, beta, gamma]}"))
    tasks = path.parent / "tasks.jsonl"
    text = path.read_text()
    assert whole % tasks in text
    path.write_text(text.replace(whole % tasks, sets % (tasks, tasks)))
    document = run_reproduce(str(path), str(out), choice=StageChoice(until="evaluate:main")).document
    rows = {row["split"]: row for answer in document["answers"][:1] for row in answer["rows"]}
    assert list(rows) == ["held_in", "held_out", "held_out: one", "held_out: two_b"]
    assert [row["tasks"] for row in rows.values()] == [3, 2, 1, 1]
    means = {row["split"]: row["value"] for row in document["columns"]
             if (row["library"], row["router"]) == ("mbc", "arrow")}  # fmt: skip
    assert means["held_out"] == pytest.approx((means["held_out: one"] + means["held_out: two_b"]) / 2)
    assert not any("one" in line for line in document["answers"][0]["lines"])  # words are about all of them together
    markdown = (out / "report.md").read_text()
    assert "| held-out: two_b (tasks, rows) |" in markdown


def _changes_do_again_only_what_hangs_on_them(make_study: Callable[..., Path], out: Path) -> None:
    """Changes one after the other, from a study that is done."""
    rows = ("held_in: 4", "held_in: 3")
    assert done(run_reproduce(str(make_study(rows)), str(out))) == ["evaluate:main"]
    seed = ("{seed: 1}", "{seed: 2}")
    again = run_reproduce(str(make_study(rows, seed)), str(out))
    assert done(again) == ["build:other", "drift:seed"]
    assert (out / "superseded" / "other-1" / "library.json").exists()
    # An expert that is gone is trained anew, by itself: its numbers may be rounded otherwise than in company.
    Library.open(out / "libraries" / "other").remove("beta")
    assert done(run_reproduce(str(make_study(rows, seed)), str(out))) in (
        ["build:other"],
        ["build:other", "drift:seed"],
    )
    # Other data of one task: all but the same question about held-out tasks hangs on it.
    assert done(run_reproduce(str(make_study(rows, seed, word="down")), str(out))) == list(ALL)


def test_stages_can_be_chosen_and_the_report_says_what_is_owed(make_study: Callable[..., Path], out: Path) -> None:
    path = str(make_study())
    nothing = run_reproduce(path, str(out), choice=StageChoice(("report",)))
    assert set(nothing.stages.values()) == {"left"}
    assert len(nothing.document["unfinished"]) == len(ALL)
    until = run_reproduce(path, str(out), choice=StageChoice(until="build:private"))
    assert done(until) == ["build:private"]
    early = run_reproduce(path, str(out), choice=StageChoice(("evaluate",)))
    assert early.stages["evaluate:main"] == "waiting"
    owed = {row["stage"]: row["columns"] for row in early.document["unfinished"]}
    assert "private/arrow held_in" in owed["evaluate:main"]
    assert early.document["answers"][0]["unfinished"] == ["mbc/arrow", "private/arrow"]
    assert "unfinished: mbc/arrow, private/arrow" in (out / "report.md").read_text()


def _end_after(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time of a study be over after so many looks at the clock."""
    calls = []

    def check_time(self: Any) -> None:
        calls.append(1)
        if len(calls) > looks:
            raise OutOfTime

    monkeypatch.setattr("lorary.study.context.TimedDisplay.check_time", check_time)


def test_a_study_that_is_out_of_time_keeps_what_it_has(
    make_study: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(make_study())
    assert done(run_reproduce(path, str(out), time_budget_s=0.0)) == []
    run_reproduce(path, str(out), choice=StageChoice(until="build:mbc"))
    _end_after(24, monkeypatch)
    cut = run_reproduce(path, str(out), choice=StageChoice(("evaluate:main",)))
    assert cut.stages["evaluate:main"] == "left"
    monkeypatch.undo()
    (owed,) = [row["columns"] for row in cut.document["unfinished"] if row["stage"] == "evaluate:main"]
    assert 0 < len(owed) < 8
    assert cut.document["columns"]
    assert done(run_reproduce(path, str(out), choice=StageChoice(("evaluate:main",)))) == ["evaluate:main"]


def test_a_build_without_time_is_cut_between_steps_and_ends_with_the_same_bytes(
    make_study: Callable[..., Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, only = str(make_study(("{steps: 3,", "{steps: 9,"))), StageChoice(("build:private",))
    run_reproduce(path, str(tmp_path / "whole"), choice=only)
    _end_after(5, monkeypatch)
    assert run_reproduce(path, str(out), choice=only).stages["build:private"] == "left"
    folder = out / "libraries" / "private"
    assert Library.open(folder).names() == []
    assert list((folder / ".build").glob("**/*.safetensors"))
    monkeypatch.undo()
    assert done(run_reproduce(path, str(out), choice=only)) == ["build:private"]
    one, other = (
        {file.parent.name: file.read_bytes() for file in where.glob("libraries/private/adapters/*/*.safetensors")}
        for where in (tmp_path / "whole", out)
    )
    assert set(one) == {"alpha", "beta", "gamma", "delta"}
    assert one == other


def test_tasks_that_are_not_there_are_said_once_and_nothing_is_written(out: Path) -> None:
    with pytest.raises(UsageError, match="needs the folder of its tasks"):
        run_reproduce("suite-cpu", str(out))
    with pytest.raises(LoraryError, match="nowhere"):
        run_reproduce("suite-cpu", str(out), tasks="nowhere")
    assert not out.exists()


def test_a_second_run_on_a_study_is_refused_and_changes_nothing(make_study: Callable[..., Path], out: Path) -> None:
    path, choice = str(make_study()), StageChoice(("build:private",))
    run_reproduce(path, str(out), choice=choice)
    changed = str(make_study(("learning_rate: 2e-2", "learning_rate: 1e-2")))
    with study_lock(out), pytest.raises(LibraryError, match=f"one run at a time.*\n.*process {os.getpid()}"):
        run_reproduce(changed, str(out), choice=choice)
    assert not (out / "superseded").exists()
    assert run_reproduce(str(make_study()), str(out), choice=choice).stages["build:private"] == "skipped"


def test_what_earlier_settings_left_is_no_result(make_study: Callable[..., Path], out: Path) -> None:
    until = StageChoice(until="drift:seed")
    assert run_reproduce(str(make_study()), str(out), choice=until).document["drift"]
    changed = str(make_study(("{build: other, train: {seed: 1}}", "{build: other, train: {seed: 3}}"),
                             ("k: 2, private: private}", "k: 2, private: private, train: {seed: 5}}")))  # fmt: skip
    again = run_reproduce(changed, str(out), choice=StageChoice(("build",)))
    owed = {row["stage"]: row["columns"] for row in again.document["unfinished"]}
    assert "mbc/arrow held_in" in owed["evaluate:main"]
    assert not again.document["drift"]
    assert not again.document["columns"]
    assert again.document["answers"][0]["unfinished"] == ["mbc/arrow", "private/arrow"]


def test_a_run_without_time_moves_nothing(make_study: Callable[..., Path], out: Path) -> None:
    run_reproduce(str(make_study()), str(out), choice=StageChoice(("build:private",)))
    changed = str(make_study(("learning_rate: 2e-2", "learning_rate: 1e-2")))
    run_reproduce(changed, str(out), time_budget_s=0.0)
    assert not (out / "superseded").exists()
    back = run_reproduce(str(make_study()), str(out), choice=StageChoice(("build:private",)))
    assert back.stages["build:private"] == "skipped"


def test_adapters_to_new_tasks_stay_while_nothing_that_decides_them_changes(
    make_study: Callable[..., Path], out: Path
) -> None:
    def adapted() -> set[str]:
        return {path.name for path in (out / "libraries").glob("few-*")}

    choice = StageChoice(("build:private", "adapt:few"))
    assert done(run_reproduce(str(make_study()), str(out), choice=choice)) == ["build:private", "adapt:few"]
    before, fewer = adapted(), ("train: {steps: 2}, held_out: 4", "train: {steps: 2}, held_out: 3")
    assert done(run_reproduce(str(make_study(fewer)), str(out), choice=choice)) == ["adapt:few"]
    assert adapted() == before


def test_clusters_need_adapters_of_all_their_tasks(make_study: Callable[..., Path], out: Path) -> None:
    path = str(make_study(("- build: private", "- {build: private, tasks: 2}")))
    result = run_reproduce(path, str(out), choice=StageChoice(until="build:mbc"))
    assert result.failed == ["build:mbc"]
    assert Library.open(out / "libraries" / "private").names() == ["alpha", "beta"]


def test_a_metric_and_a_list_of_tasks_are_part_of_what_is_scored(make_study: Callable[..., Path], out: Path) -> None:
    choice = StageChoice(("build:private", "evaluate:small"))
    small = "{evaluate: small, libraries: [private], routers: [arrow], held_in: 2, held_out: 2}"
    stage = ("  - {build: part", f"  - {small}\n  - {{build: part")
    assert done(run_reproduce(str(make_study(stage)), str(out), choice=choice)) == ["build:private", "evaluate:small"]
    # `alpha` is held-in already: held out too, it is another question.
    again = run_reproduce(str(make_study(stage, ("names: [omega]", "names: [omega, alpha]"))), str(out), choice=choice)
    assert done(again) == ["evaluate:small"]
    held_out = [row["tasks"] for row in again.document["columns"] if row["split"] == "held_out"]
    assert held_out == [2, 2]
    folder = make_study(stage).parent / "tasks"
    folder.mkdir()
    (folder / "tasks.jsonl").write_text((folder.parent / "tasks.jsonl").read_text())
    for metric in ("em", "rougeL"):
        tasks = [{"task": name, "family": "f", "role": role, "metric": metric, "file": "tasks.jsonl"}
                 for role, names in (("train", ("alpha", "beta", "gamma", "delta")), ("heldout", ("omega",)))
                 for name in names]  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps({"tasks": tasks}))
        path = make_study(stage)
        path.write_text(path.read_text().replace(str(folder.parent / "tasks.jsonl"), str(folder)))
        found = run_reproduce(str(path), str(out), choice=choice)
        assert {cell["metric"] for cell in found.document["cells"] if cell["primary"]} == {metric}


def test_two_held_out_sets_with_one_task_are_refused(make_study: Callable[..., Path], out: Path) -> None:
    path = make_study()
    tasks = path.parent / "tasks.jsonl"
    one = f"{{reference: {tasks}, names: [omega]}}"
    path.write_text(path.read_text().replace(f"held_out: {one}", f"held_out: [{one}, {one}]"))
    with pytest.raises(TaskError, match="a held-out task must be in one set alone\nfound: 'omega', twice"):
        run_reproduce(str(path), str(out))


def test_the_commands_of_a_report_make_the_same(make_study: Callable[..., Path], out: Path) -> None:
    path = str(
        make_study(
            ("evals: 1", "evals: 1, clip: 0.5"), ("k: 2, private: private", "k: 2, private: private, cluster_seed: 7")
        )
    )
    result = run_reproduce(path, str(out), choice=StageChoice(("report",)), dtype="float64", device="cpu")
    assert "--device cpu --dtype float64" in result.document["command"]
    rows = {row["stage"]: row["plain"] for row in result.document["stages"]}
    assert rows["build:mbc"] is None  # no option of `lorary build` sets the clipping
    path = str(make_study(("k: 2, private: private", "k: 2, private: private, cluster_seed: 7")))
    rows = {
        row["stage"]: row["plain"]
        for row in run_reproduce(path, str(out), choice=StageChoice(("report",))).document["stages"]
    }
    assert "--cluster-method delta --cluster-seed 7" in rows["build:mbc"]
    odd = str(out.parent / "o; rm x")
    spaced = run_reproduce(path, odd, choice=StageChoice(("report",))).document
    assert shlex.split(spaced["command"])[4] == odd
    assert shlex.split(spaced["stages"][0]["plain"])[4] == f"{odd}/libraries/private"
    # The tables say a list of tasks once, and `TASKS=...` is what a shell takes.
    assert all("--tasks alpha,beta,gamma,delta " in rows[name] for name in ("build:private", "build:mbc"))
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert (
            text.count("TASKS=alpha,beta,gamma,delta<" if name.endswith("l") else "`TASKS=alpha,beta,gamma,delta`") == 1
        )
        assert "--method mbc --tasks $TASKS --base" in text
        assert "--tasks alpha,beta" not in text


def test_a_study_that_is_interrupted_in_a_build_goes_on_with_it(
    make_study: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, commits, add = str(make_study()), [], Library.add_adapter

    def interrupted(self: Library, *args: Any) -> str:
        commits.append(self.name)
        if len(commits) == 3:
            raise KeyboardInterrupt
        return add(self, *args)

    monkeypatch.setattr(Library, "add_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_reproduce(path, str(out), choice=StageChoice(until="build:private"))
    monkeypatch.undo()
    again = run_reproduce(path, str(out), choice=StageChoice(until="build:private"))
    (row,) = [row for row in again.document["stages"] if row["stage"] == "build:private"]
    assert row["note"] == "2 experts trained, 2 kept"
    assert not (out / "superseded").exists()


def test_a_study_that_is_killed_goes_on_to_the_same_numbers(
    make_study: Callable[..., Path], out: Path, tmp_path: Path
) -> None:
    path = str(make_study())
    command = [sys.executable, "-m", "lorary", "reproduce", path, "--until", "evaluate:main", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
    record = out / "stages" / "evaluate-main.json"
    while not record.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert json.loads(record.read_text())["status"] == "running"
    choice = StageChoice(until="evaluate:main")
    resumed = run_reproduce(path, str(out), choice=choice)
    assert resumed.stages["evaluate:main"] == DONE
    whole = run_reproduce(path, str(tmp_path / "whole"), choice=choice)
    assert resumed.document["columns"] == whole.document["columns"]
