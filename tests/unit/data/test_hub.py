"""Data sets: a folder and files that `datasets` itself loads, offline; an id that cannot be reached."""

import json
from pathlib import Path

import datasets
import pytest

from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError

ROW = {"source": "2 + 2 =", "target": "4"}


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()


def save(folder: Path, **splits: list[dict[str, object]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_local_folder_becomes_one_task_named_after_it(tmp_path):
    folder = save(tmp_path / "sums", train=[ROW, ROW | {"source": "1 + 3 ="}], validation=[ROW], test=[ROW])
    task = load_tasks(folder)["sums"]
    assert [len(task.split(name)) for name in ("train", "val", "test")] == [2, 1, 1]
    assert task.split("train")[1].source == "1 + 3 ="
    assert (task.family, task.role, task.metric) == ("none", "train", "em")


def test_columns_of_the_row_format_are_understood_and_others_are_gathered_under_extra(tmp_path):
    row = ROW | {"task": "sum", "family": "f", "options": ["4", "5"], "targets": ["4", "four"], "id": 7}
    tasks = load_tasks(save(tmp_path / "sums", test=[row, row | {"task": "other", "options": None}]), names=["sum"])
    [found] = tasks["sum"].split("test")
    assert (found.options, found.references, found.family) == (("4", "5"), ("4", "four"), "f")
    assert found.extra == {"id": 7}
    assert tasks["sum"].metric == "acc"


def test_a_column_split_says_where_the_rows_of_a_single_file_belong(tmp_path):
    path = tmp_path / "sums.json"
    path.write_text(json.dumps([ROW | {"split": "train"}, ROW | {"split": "test"}]))
    task = load_tasks(path)["sums"]
    assert [len(task.split(name)) for name in ("train", "val", "test")] == [1, 0, 1]


def test_a_csv_file_is_read_and_its_numbers_are_refused_where_texts_belong(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("source,target\none,eins\n")
    assert load_tasks(path)["sums"].split("train")[0].target == "eins"
    path.write_text("source,target\none,1\n")
    with pytest.raises(TaskError, match=r"sums\.csv', split 'train', row 0: field 'target' .* text\nfound: 1"):
        load_tasks(path)


def test_a_bad_row_is_refused_by_data_set_split_and_row(tmp_path):
    folder = save(tmp_path / "sums", train=[ROW], dev=[ROW, ROW | {"target": " "}])
    with pytest.raises(TaskError, match=r"data set '.*sums', split 'validation', row 1: field 'target'"):
        load_tasks(folder)


def test_missing_columns_are_refused_by_name(tmp_path):
    folder = save(tmp_path / "sums", train=[{"question": "2 + 2 =", "target": "4"}])
    with pytest.raises(TaskError, match=r"no source among question, target"):
        load_tasks(folder)


def test_a_value_that_json_cannot_hold_is_refused(tmp_path):
    folder = save(tmp_path / "sums", train=[ROW | {"blob": b"abc"}])
    with pytest.raises(TaskError, match=r"row 0: field 'extra' may only hold JSON values"):
        load_tasks(folder)


def test_a_split_with_another_name_is_refused(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **options: {"unsupervised": datasets.Dataset.from_list([ROW])}
    )
    with pytest.raises(TaskError, match=r"split 'unsupervised': a split must be called train, val, test, "):
        load_tasks("somebody/sums")


@pytest.mark.parametrize(
    ("reference", "asked"),
    [("somebody/sums", ("somebody/sums", None)), ("somebody/sums:easy", ("somebody/sums", "easy"))],
)
def test_an_id_may_name_a_configuration_and_no_code_is_trusted(monkeypatch, reference, asked):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return {"validation": datasets.Dataset.from_list([ROW])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_tasks(reference)["sums"].split("val")) == 1
    assert calls == [(asked, {})]


def test_an_id_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(TaskError, match=r"data set 'nobody/nothing' must load(.|\n)*remedy: check the id"):
        load_tasks("nobody/nothing")


def test_a_folder_with_nothing_to_read_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(TaskError, match=r"must hold manifest\.json, \.jsonl files, or a data set"):
        load_tasks(tmp_path)


def test_a_missing_file_that_datasets_would_read_is_not_taken_for_an_id():
    with pytest.raises(UsageError, match="check the path"):
        load_tasks("nobody/nothing.parquet")
