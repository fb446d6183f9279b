"""Data sets: a folder and files that `datasets` itself loads, offline; an id that cannot be reached."""

import csv
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest

from lorary.data.hub import read_dataset
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


AS_IT_STANDS = [
    "None",
    "NA",
    "nan",
    "null",
    "007",
    "True",
    "1e5",
    "1.50",
    "2026-01-02",
    "2026-01-02T03:04:05Z",
    "#N/A",
    " x ",
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "arrow"])
def test_texts_stay_as_they_stand_in_a_file_of_any_kind(tmp_path, ending):
    rows = [{"source": f"row {i}", "target": text, "family": "NA", "when": text} for i, text in enumerate(AS_IT_STANDS)]
    path = tmp_path / "texts" / f"train.{ending}"
    path.parent.mkdir()
    if ending in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    if ending == "jsonl":  # one in the folder itself would hold rows of ours
        path.parent.joinpath("data").mkdir()
        path = path.rename(path.parent / "data" / path.name)
    [task] = load_tasks(tmp_path / "texts").values()
    assert [row.target for row in task.split("train")] == AS_IT_STANDS
    assert [row.extra["when"] for row in task.split("train")] == AS_IT_STANDS
    assert task.family == "NA"


def test_cells_may_hold_quotes_delimiters_and_line_breaks_and_empty_ones_give_no_optional_field(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_bytes(b'source,target,family\r\n"a ""b"", c","x\r\ny",\r\n\r\nd,e,f\r\n')
    rows = [row for task in load_csv(path) for row in task]
    assert rows == [('a "b", c', "x\r\ny", None), ("d", "e", "f")]


def load_csv(path):
    yield [(row.source, row.target, row.family) for row in read_dataset(path)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source,target\na,b,c\n", r"sums\.csv:2: a row must have a cell for each of the 2 columns\nfound: 3 cells"),
        ("source,target\na\n", r"sums\.csv:2: .*\nfound: 1 cells"),
        ("source,target,target\na,b,c\n", r"a column must have a name of its own\nfound: 'target', twice"),
        ('source,target\na,"b"c\n', r"sums\.csv:2: the text must be cells, quoted as CSV"),
        ("source,target\na,\xff\n", r"must be UTF-8\nfound: byte 0xff"),
        ("source;target\na;b\n", r"no source and no target among source;target"),
    ],
)
def test_cells_that_are_not_a_table_are_refused_by_line(tmp_path, text, message):
    path = tmp_path / "sums.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TaskError, match=message):
        load_tasks(path)


@pytest.mark.parametrize("rows", ['[{"source": "a", "target": 7}]', '{"source": ["a"], "target": [7]}'])
def test_a_number_in_json_is_refused_where_a_text_belongs(tmp_path, rows):
    path = tmp_path / "sums.json"
    path.write_text(rows)
    with pytest.raises(TaskError, match=r"sums\.json', row 0: field 'target' .* text\nfound: 7"):
        load_tasks(path)


def test_rows_of_json_keep_their_own_objects(tmp_path):
    path = tmp_path / "sums.json"
    path.write_text(json.dumps([ROW | {"extra": {"a": 1}}, ROW | {"extra": {"b": "2020-01-01"}}]))
    assert [row.extra for row in read_dataset(path)] == [{"a": 1}, {"b": "2020-01-01"}]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_more_rows_than_memory_holds_are_refused_by_number(tmp_path, monkeypatch, ending):
    monkeypatch.setattr("lorary.data.tables.MAX_ROWS", 3)
    table = pyarrow.Table.from_pylist([{"source": "a", "target": "b"}] * 5)
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(TaskError, match=r"at most 3 rows\nfound: 5"):
        load_tasks(path)


def test_a_file_edited_with_its_time_kept_is_read_anew(tmp_path):
    path = tmp_path / "sums.csv"
    path.write_text("source,target\none,eins\n")
    os.utime(path, (1, 1))
    assert load_tasks(path)["sums"].split("train")[0].target == "eins"
    path.write_text("source,target\none,zwei\n")
    os.utime(path, (1, 1))
    assert load_tasks(path)["sums"].split("train")[0].target == "zwei"


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
