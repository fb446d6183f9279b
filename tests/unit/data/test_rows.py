"""The row format: what is read exactly, and what is refused by name."""

import io
import json
import os
import re
import time
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.data.jsonl import decode_json, iter_rows
from lorary.data.schema import Row, Task, make_task, parse_row
from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError

GOOD = {"task": "t", "split": "train", "source": "2 + 2 =", "target": "4"}

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())
choices = st.lists(texts, unique=True, max_size=4)


@st.composite
def records(draw: st.DrawFn) -> dict[str, object]:
    target = draw(texts)
    others = [text for text in draw(choices) if text != target]
    record: dict[str, object] = {
        "task": draw(texts),
        "split": draw(st.sampled_from(["train", "val", "test"])),
        "source": draw(texts),
        "target": target,
    }
    optional = {
        "family": draw(texts),
        "targets": [target, *others],
        "options": [*others, target],
        "extra": {"note": draw(texts), "list": [1, None, 2.5]},
    }
    keys = draw(st.sets(st.sampled_from(sorted(optional))))
    return record | {key: optional[key] for key in keys if key != "options" or others}


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "tasks.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@given(st.lists(records(), max_size=4), st.booleans())
def test_every_valid_row_comes_back_value_for_value(tmp_path_factory, given_records, ascii_only):
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in given_records]
    path = write(tmp_path_factory.mktemp("rows"), *lines)
    rows = list(iter_rows(path))
    assert len(rows) == len(given_records)
    for row, record in zip(rows, given_records, strict=True):
        assert json.loads(row.canonical_json()) == record
        assert row.references == tuple(record.get("targets", [record["target"]]))


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_passed_over(tmp_path):
    line = json.dumps(GOOD)
    path = write(tmp_path, b"\xef\xbb\xbf" + line.encode() + b"\r", "", "  \t", line)
    assert list(iter_rows(path)) == [parse_row(GOOD, "")] * 2


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = write(tmp_path, json.dumps(GOOD | {"source": "a\u2028b\x85c"}, ensure_ascii=False))
    assert [row.source for row in iter_rows(path)] == ["a\u2028b\x85c"]


def test_rows_are_streamed_so_that_a_bad_line_is_met_only_when_it_is_reached(tmp_path):
    rows = iter_rows(write(tmp_path, json.dumps(GOOD), "{"))
    assert next(rows).target == "4"
    with pytest.raises(TaskError, match=r"tasks\.jsonl:2"):
        next(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"must be valid JSON\nfound: .*column 2"),
        ("[1, 2]", r"must be a JSON object\nfound: \[1, 2\]"),
        ('{"a": 1} {"b": 2}', r"must be valid JSON\nfound: Extra data"),
        ('{"task": "t", "task": "u"}', r"plain JSON\nfound: .*'task' is given twice"),
        ('{"task": NaN}', r"plain JSON\nfound: .*NaN is no JSON number"),
        ("[" * 100_000, r"must be (plain|valid) JSON"),
        (b'{"task": "\xff"}', r"must be UTF-8\nfound: byte 0xff at position 11\nremedy: save the file as UTF-8"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path, json.dumps(GOOD), "", line)
    with pytest.raises(TaskError, match=rf"tasks\.jsonl:3: .*{message}"):
        list(iter_rows(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, r"field 'source' is missing\nremedy: add \"source\""),
        ({"target": ""}, r"field 'target' must be a non-empty text\nfound: ''"),
        ({"target": " \n"}, r"field 'target' must be a non-empty text"),
        ({"task": 7}, r"field 'task' must be a non-empty text\nfound: 7"),
        ({"source": "\ud800"}, r"field 'source' must be valid Unicode"),
        ({"split": "dev"}, r"field 'split' must be train, val or test\nfound: 'dev'"),
        ({"family": ["a"]}, r"field 'family' must be a non-empty text\nfound: \['a'\]"),
        ({"options": ["1", "2"]}, r"field 'options' must contain the target\nfound: target '4', options \['1', '2'\]"),
        ({"options": ["4"]}, r"field 'options' must hold at least two texts"),
        ({"options": ["4", "5", "4"]}, r"field 'options' must not repeat"),
        ({"options": "4 5"}, r"field 'options' must be a list of texts\nfound: '4 5'"),
        ({"options": ["4", 5]}, r"field 'options' must be a non-empty text\nfound: 5"),
        ({"targets": ["four"]}, r"field 'targets' must contain the target"),
        ({"extra": 3}, r"field 'extra' must be a JSON object\nfound: 3"),
        ({"extra": {"a": {1, 2}}}, r"field 'extra' may only hold JSON values"),
        ({"label": 1, "id": 2}, r"may only have the fields .*\nfound: 'id', 'label'\nremedy: put .* under 'extra'"),
    ],
)
def test_a_wrong_field_is_refused_with_place_value_and_remedy(change, message):
    with pytest.raises(TaskError, match=rf"(?s)^here:7: .*{message}") as caught:
        parse_row(GOOD | change, "here:7")
    assert caught.value.remedy


def test_a_long_value_is_shortened_in_the_error():
    with pytest.raises(TaskError) as caught:
        parse_row(GOOD | {"split": "x" * 10_000}, "here:1")
    assert len(str(caught.value)) < 300


def test_null_and_empty_lists_mean_that_an_optional_field_is_absent():
    empty = {"family": None, "targets": [], "options": None, "extra": {}}
    assert parse_row(GOOD | empty, "") == parse_row(GOOD, "")


def test_a_missing_file_and_an_unreadable_one_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"must exist\nfound: .*none\.jsonl"):
        next(iter_rows(tmp_path / "none.jsonl"))
    with pytest.raises(TaskError, match="must be readable"):
        next(iter_rows(tmp_path))


def task(*rows: Row) -> Task:
    return make_task("t", rows, "here")


def test_the_data_hash_sees_every_value_and_the_order_of_rows():
    first, second = Row("t", "train", "a", "b"), Row("t", "train", "c", "d")
    hashes = {
        task(first).data_hash,
        task(first, second).data_hash,
        task(second, first).data_hash,
        task(Row("t", "val", "a", "b")).data_hash,
        task(Row("t", "train", "a", "b", options=("b", "c"))).data_hash,
        task(Row("t", "train", "a", "b", targets=("b", "c"))).data_hash,
        task(Row("t", "train", "a", "b", extra={"k": 1})).data_hash,
        task(Row("t", "train", "a", "b", family="f")).data_hash,
    }
    assert len(hashes) == 8


def test_the_data_hash_ignores_how_the_file_spelt_the_row(tmp_path):
    record = GOOD | {"extra": {"b": 1, "a": 2}, "source": "né"}
    plain = write(tmp_path, json.dumps(record, ensure_ascii=True))
    hash_plain = task(*iter_rows(plain)).data_hash
    turned = write(tmp_path, "", json.dumps(dict(reversed(record.items())) | {"options": []}, ensure_ascii=False))
    assert task(*iter_rows(turned)).data_hash == hash_plain


def test_a_task_fills_in_family_role_and_metric():
    train, test = Row("t", "train", "a", "b", family="f"), Row("t", "test", "a", "b", options=("b", "c"))
    assert (task(train).role, task(train).metric, task(train).family) == ("train", "em", "f")
    assert (task(test).role, task(test).metric, task(test).family) == ("heldout", "acc", "none")
    assert task(train, test).metric == "em"
    assert task(train, test).split("train") == (train,)
    assert task(train, test).split("val") == ()


def test_a_task_without_rows_or_with_two_families_is_refused():
    with pytest.raises(TaskError, match="here: task 't' must have rows"):
        task()
    with pytest.raises(TaskError, match=r"one family\nfound: f, g"):
        task(Row("t", "train", "a", "b", family="f"), Row("t", "train", "a", "b", family="g"))
    with pytest.raises(UsageError, match="train, val, test"):
        task(Row("t", "train", "a", "b")).split("validation")


DEEP = "[" * 150 + "]" * 150


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('{"n": 1e400}', r"1e400 is larger than a number can be"),
        ('{"n": -1e999}', r"-1e999 is larger than a number can be"),
        ('{"n": 1' + "0" * 400 + "}", r"is larger than a number can be"),
        ('{"n": 1' + "0" * 9000 + "}", r"is larger than a number can be"),
        ('{"n": "\\ud800"}', r"field 'extra' may only hold JSON values"),
        ('{"\\udfff": 1}', r"field 'extra' may only hold JSON values"),
        ('{"n": ' + DEEP + "}", r"nested more than 100 deep"),
        ('{"n": ' + "[" * 100_000, r"must be (plain|valid) JSON"),
    ],
)
def test_numbers_depths_and_halves_of_characters_that_nothing_can_hold_are_refused_by_line(tmp_path, extra, message):
    line = json.dumps(GOOD | {"extra": "EXTRA"}).replace('"EXTRA"', extra)
    with pytest.raises(TaskError, match=r"tasks\.jsonl:1: ") as caught:
        list(iter_rows(write(tmp_path, line)))
    assert re.search(message, str(caught.value))


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("lorary.data.jsonl.MAX_LINE_BYTES", 1000)
    line = json.dumps(GOOD)
    path = write(tmp_path, line, line.replace("}", " " * 1000 + "}"))
    with pytest.raises(TaskError, match=r"tasks\.jsonl:2: a line must have at most 1,000 bytes"):
        list(iter_rows(path))
    assert len(list(iter_rows(write(tmp_path, *[line] * 50)))) == 50


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 200 + "[]]",
        "[" + "{}," * 200 + "{}]",
        '[{"source": "a", "target": "b", "numbers": [' + "1," * 400 + "1]}]",
        '[{"source": "a", "target": "b", "extra": {' + ",".join(f'"{number}":1' for number in range(200)) + "}}]",
    ],
)
def test_a_document_of_endless_values_is_refused_before_it_is_parsed(tmp_path, monkeypatch, text):
    monkeypatch.setattr("lorary.data.jsonl.MAX_VALUE_BYTES", 1000)
    for name in ("rows.json", "manifest.json"):
        (tmp_path / name).write_text(text)
        with pytest.raises(TaskError, match=rf"{name}: the values of a document of [\d,]+ bytes must take at most"):
            load_tasks(tmp_path / name if name == "rows.json" else tmp_path)


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.jsonl"])
def test_a_file_of_holes_is_refused_before_all_of_it_is_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    os.truncate(path, 200 * 1024 * 1024)
    start = time.thread_time()
    with pytest.raises(TaskError, match=rf"{name}.*must (be text|have at most 16,777,216)"):
        load_tasks(path)
    assert time.thread_time() - start < 10


def test_a_line_of_endless_brackets_is_refused_before_it_is_parsed(tmp_path):
    path = write(tmp_path, '{"task": ' + "[" + "[]," * 700_000 + "[]]}")
    with pytest.raises(
        TaskError, match=r"tasks\.jsonl:1: the values of a document of [\d,]+ bytes must take at most 67"
    ):
        list(iter_rows(path))


def test_a_large_document_of_rows_of_text_may_hold_as_many_as_it_is_large(monkeypatch):
    monkeypatch.setattr("lorary.data.jsonl.MAX_VALUE_BYTES", 1000)
    rows = [{"source": f"a question of some length {number}", "target": "an answer"} for number in range(100)]
    assert decode_json(json.dumps(rows).encode(), "x") == rows


def test_a_key_that_stands_twice_among_many_is_found_at_once():
    data = b"{" + b",".join(b'"%d":0' % number for number in range(100_000)) + b',"99999":0}'
    start = time.thread_time()
    with pytest.raises(TaskError, match="'99999' is given twice"):
        decode_json(data, "x")
    assert time.thread_time() - start < 10


def test_an_arrow_file_whose_texts_are_none_is_refused_by_name(tmp_path):
    table = pyarrow.Table.from_pylist([{"source": "aaaaaaaa", "target": "bbbbbbbb"}])
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "x.arrow").write_bytes(sink.getvalue().replace(b"aaaaaaaa", b"aaa\xff\xfeaaa"))
    with pytest.raises(TaskError, match=r"x\.arrow must be an Arrow file that can be read\nfound: .*UTF8"):
        load_tasks(tmp_path / "x.arrow")
