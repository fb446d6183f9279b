"""Held-out tasks stay held out: what is reported, and what is left to train on."""

import json
from pathlib import Path

import pytest

from lorary.build.build_library import separate_tasks
from lorary.data.decontaminate import decontaminate, keep_apart
from lorary.data.schema import Row, Task, make_task
from lorary.display import Display
from lorary.errors import TaskError, UsageError

FACT = "the slow brown tortoise was seen walking over nine frozen hills"


def task(name: str, *train: str, val: tuple[str, ...] = ("fine",), test: tuple[str, ...] = ()) -> Task:
    rows = [Row(name, split, text, "yes") for split, texts in (("train", train), ("val", val), ("test", test))
            for text in texts]  # fmt: skip
    return make_task(name, rows, "here")


TRAIN = {"bool_q": task("bool_q", "one"), "clean": task("clean", "two"), "leak": task("leak", "three", FACT)}
HELD = {"boolq": task("boolq", val=(), test=("five",)), "facts": task("facts", val=(), test=(FACT,))}


def test_a_report_keeps_everything_and_names_each_pair() -> None:
    kept, found = decontaminate(TRAIN, HELD)
    assert kept == TRAIN
    assert [(pair.train, pair.heldout, pair.name, pair.train_rows) for pair in found.overlaps] == [
        ("bool_q", "boolq", "boolq", 0), ("leak", "facts", None, 1)
    ]  # fmt: skip
    assert (found.dropped, found.dropped_rows) == ((), {})
    text = "\n".join(found.lines())
    assert "bool_q and boolq: both name boolq" in text
    assert "leak and facts: text in 1 rows and 1, such as" in text
    assert json.loads(json.dumps(found.to_json()))["overlaps"][1]["train"] == "leak"


def test_drop_leaves_out_whole_tasks() -> None:
    kept, found = decontaminate(TRAIN, HELD, mode="drop")
    assert list(kept) == ["clean"]
    assert found.dropped == ["bool_q", "leak"]
    assert "left out: bool_q, leak" in found.lines()[-1]


def test_drop_rows_leaves_out_rows_and_keeps_the_rest_of_the_task() -> None:
    kept, found = decontaminate(TRAIN, HELD, mode="drop-rows")
    assert list(kept) == ["bool_q", "clean", "leak"]
    assert [row.source for row in kept["leak"].split("train")] == ["three"]
    assert kept["leak"].data_hash != TRAIN["leak"].data_hash
    assert (kept["clean"] is TRAIN["clean"], found.dropped_rows) == (True, {"leak": 1})
    assert find_again(kept) == []


def find_again(kept: dict[str, Task]) -> list[str]:
    return [pair.train for pair in decontaminate(kept, HELD)[1].overlaps if pair.train_rows]


def test_a_task_without_rows_of_a_split_that_training_needs_is_dropped() -> None:
    train = {"a": task("a", FACT), "b": task("b", "fine", val=(FACT,)), "c": task("c", "fine")}
    kept, found = decontaminate(train, HELD, mode="drop-rows")
    assert (list(kept), found.dropped, found.dropped_rows) == (["c"], ["a", "b"], {})


def test_nothing_left_to_train_on_is_one_clear_error() -> None:
    with pytest.raises(TaskError, match=r"must be left(.|\n)*all 1 overlap: leak"):
        decontaminate({"leak": TRAIN["leak"]}, HELD, mode="drop")


def test_no_overlap_is_said_too() -> None:
    kept, found = decontaminate({"clean": TRAIN["clean"]}, HELD, mode="drop")
    assert list(kept) == ["clean"]
    assert found.lines() == ["overlap with held-out tasks: none"]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="--overlap must be one of report, drop, drop-rows"):
        decontaminate(TRAIN, HELD, mode="remove")
    with pytest.raises(UsageError, match="at least 2"):
        decontaminate(TRAIN, HELD, ngram=1)
    with pytest.raises(UsageError, match=r"--overlap must be report or drop\nfound: drop-rows"):
        separate_tasks(TRAIN, "builtin", "drop-rows", Display())
    with pytest.raises(UsageError, match="--overlap needs --held-out"):
        separate_tasks(TRAIN, None, "drop", Display())


def write(path: Path, *rows: Row) -> Path:
    fields = ("task", "split", "source", "target")
    path.write_text("".join(json.dumps({name: getattr(row, name) for name in fields}) + "\n" for row in rows))
    return path


def test_of_a_reference_those_are_kept_apart_that_are_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", Row("leak", "train", FACT, "yes"), Row("other", "test", "x", "y"))
    assert keep_apart(TRAIN, str(path), "report")[1].overlaps == []
    path = write(tmp_path / "b.jsonl", Row("leak", "train", FACT, "yes"))
    assert [pair.name for pair in keep_apart(TRAIN, str(path), "report")[1].overlaps] == ["leak"]


def test_what_is_found_is_said_and_asked_for_by_nobody_it_is_not_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert separate_tasks(TRAIN, None, "report", Display()) == (TRAIN, None)
    assert capsys.readouterr().err == ""
    separate_tasks(TRAIN, "builtin", "report", Display())
    assert capsys.readouterr().err == "overlap with held-out tasks: none\n"
