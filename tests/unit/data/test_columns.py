"""Own data as people have it: known columns, columns that are named, conversations, and rows without a split."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorary.data.columns import NamedColumns, parse_columns
from lorary.data.conversation import Conversation
from lorary.data.division import divide
from lorary.data.schema import Row, Task
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.errors import TaskError, UsageError

Rows = list[dict[str, Any]]
divided = pytest.mark.filterwarnings("ignore:.*nothing says a split")
# Texts that a reader with opinions would turn into something else.
AS_THEY_STAND = ["007", "NA", "None", "true", "1e5", "2026-01-02", " x "]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(tasks: dict[str, Task]) -> list[Row]:
    (task,) = tasks.values()
    return [row for split in ("train", "val", "test") for row in task.split(split)]


@divided
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "columns", [("source", "target"), ("prompt", "completion"), ("question", "answer"), ("instruction", "output")]
)
def test_known_columns_are_read_as_they_stand(tmp_path: Path, ending: str, columns: tuple[str, str]) -> None:
    rows = [{columns[0]: f"a {i}", columns[1]: text, "note": text} for i, text in enumerate(AS_THEY_STAND)]
    read = only(load_tasks(write(tmp_path / f"mine.{ending}", rows)))
    assert sorted((row.source, row.target) for row in read) == [(f"a {i}", t) for i, t in enumerate(AS_THEY_STAND)]
    assert {row.task for row in read} == {"mine"}
    assert sorted(row.extra["note"] for row in read) == sorted(AS_THEY_STAND)


@divided
def test_an_instruction_is_joined_with_its_input_where_there_is_one(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "input": None, "output": "ho"},
    ]
    read = only(load_tasks(write(tmp_path / "mine.jsonl", rows)))
    assert {row.source for row in read} == {"Add.\n\n1 and 2", "Say hi.", "Say ho."}
    assert all(row.extra == {} for row in read)


@divided
def test_a_column_called_source_beside_question_and_answer_is_no_prompt(tmp_path: Path) -> None:
    (row,) = only(load_tasks(write(tmp_path / "mine.jsonl", [{"question": "q", "answer": "a", "source": "a wiki"}])))
    assert (row.source, row.target, row.extra) == ("q", "a", {"source": "a wiki"})


@divided
def test_columns_that_are_named_are_read_and_the_others_kept(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2", "a": "4", "choices": ["4", "5"], "prompt": "x", "completion": "y"}]
    path = write(tmp_path / "mine.parquet", rows)
    (row,) = only(load_tasks(path, columns="source=q, target=a, options=choices"))
    assert (row.source, row.target, row.options) == ("2 + 2", "4", ("4", "5"))
    assert row.extra == {"prompt": "x", "completion": "y"}
    # Of a kind that is known, too, so that one may say which of two kinds is meant.
    (row,) = only(load_tasks(write(tmp_path / "mine.jsonl", rows), columns="source=prompt,target=completion"))
    assert row.source == "x"


def test_columns_may_name_task_and_split(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b", "kind": "k", "part": "test"}, {"q": "c", "a": "d", "kind": "l", "part": "val"}]
    tasks = load_tasks(write(tmp_path / "x.csv", rows), columns="source=q,target=a,task=kind,split=part")
    assert {name: (len(task.split("val")), len(task.split("test"))) for name, task in tasks.items()} == {
        "k": (0, 1),
        "l": (1, 0),
    }


@pytest.mark.parametrize(
    ("row", "columns", "match"),
    [
        ({"q": "a", "b": "c"}, None, r"no source and no target among b, q\nremedy: --columns source=COLUMN"),
        ({"q": "a"}, "source=q,target=a", r"columns of --columns must be there\nfound: no a among q"),
        ({"prompt": "a", "completion": "b", "question": "c", "answer": "d"}, None, r"of one kind\nfound: prompt, comp"),
        ({"prompt": "a", "completion": 7}, None, r"'target' must be a non-empty text\nfound: 7.*column 'completion'"),
        ({"prompt": "a", "completion": " "}, None, r"row 0: field 'target' must be a non-empty text"),
        ({"prompt": "a", "completion": "b", "extra": {"x": 1}, "y": 2}, None, r"beside a column 'extra'.*\nfound: y"),
        ({"prompt": "a", "completion": "b", "split": "dev"}, None, "field 'split' must be train, val or test"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_rows_without_prompt_and_answer_are_refused_by_their_columns(
    tmp_path: Path, row: dict[str, Any], columns: str | None, match: str, ending: str
) -> None:
    path = write(tmp_path / f"mine.{ending}", [row])
    with pytest.raises(TaskError, match=f"(?s)mine.{ending}.*{match}"):
        load_tasks(path, columns=columns)


@pytest.mark.parametrize(
    "text", ["", "source", "source=", "sorce=a,target=b", "source=a", "target=b", "source=a,source=b,target=c",
             "messages=m,source=a", "messages=m,source=a,target=b", "extra=a,source=b,target=c"],
)  # fmt: skip
def test_columns_that_name_no_prompt_and_answer_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--columns must"):
        parse_columns(text)


def test_columns_are_parsed_by_field() -> None:
    assert parse_columns(" source = a b , target=c") == NamedColumns((("source", "a b"), ("target", "c")))


def test_columns_mean_nothing_to_tasks_that_are_no_files_of_ones_own(tmp_path: Path) -> None:
    rows = [{"task": "a", "split": "train", "source": "x", "target": "y"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "manifest.json").write_text(json.dumps({"tasks": [{"task": "a", "file": "a.jsonl"}]}))
    for reference in ("builtin", "zero-shot", str(tmp_path)):
        with pytest.raises(UsageError, match="--columns is for"):
            load_tasks(reference, columns="source=source,target=target")


def test_a_row_with_its_task_and_without_its_split_is_still_a_slip(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"task": "a", "source": "x", "target": "y"}])
    with pytest.raises(TaskError, match=r"rows\.jsonl:1: field 'split' is missing"):
        load_tasks(path)


def test_files_whose_names_say_the_split_are_one_task(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        write(
            tmp_path / "mine" / f"{split}.jsonl", [{"prompt": f"{split} {i}", "completion": "b"} for i in range(count)]
        )
    (task,) = load_tasks(tmp_path / "mine").values()
    assert (task.name, [len(task.split(split)) for split in ("train", "val", "test")]) == ("mine", [3, 2, 1])


@divided
def test_files_whose_names_say_no_split_are_a_task_each(tmp_path: Path) -> None:
    for name in ("sums", "words"):
        write(tmp_path / "mine" / f"{name}.jsonl", [{"prompt": f"{name} {i}", "completion": "b"} for i in range(20)])
    tasks = load_tasks(tmp_path / "mine")
    assert list(tasks) == ["sums", "words"]
    assert [len(tasks["sums"].split(split)) for split in ("train", "val", "test")] == [16, 2, 2]
    assert list(load_tasks(tmp_path / "mine", names=["words"])) == ["words"]


@divided
def test_a_file_of_another_ending_is_read_as_lines_where_its_columns_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.txt", [{"q": "a", "a": "b"}])
    assert only(load_tasks(path, columns="source=q,target=a"))[0].source == "a"


# Rows without a split.
def rows_of(prompts: list[str]) -> list[Row]:
    return [Row("t", "train", prompt, f"answer {i}") for i, prompt in enumerate(prompts)]


def test_rows_without_a_split_are_divided_and_it_is_said() -> None:
    with pytest.warns(UserWarning, match=r"mine: nothing says a split.*: 40 train, 5 val, 5 test"):
        parts = divide(rows_of([f"prompt {i}" for i in range(50)]), "mine")
    assert [row.source for row in parts] == [f"prompt {i}" for i in range(50)]


@divided
def test_rows_of_one_prompt_are_never_divided() -> None:
    parts = divide(rows_of([f"prompt {i % 12}" for i in range(60)]), "mine")
    assert {row.split for row in parts} == {"train", "val", "test"}
    for prompt in {row.source for row in parts}:
        assert len({row.split for row in parts if row.source == prompt}) == 1


@divided
def test_the_division_depends_on_prompts_and_not_on_their_order() -> None:
    prompts = [f"prompt {i}" for i in range(30)]
    one, other = divide(rows_of(prompts), "a"), divide(rows_of(prompts[::-1]), "b")
    assert {row.source: row.split for row in one} == {row.source: row.split for row in other}


@divided
def test_two_prompts_are_for_training_and_three_are_divided() -> None:
    assert {row.split for row in divide(rows_of(["a", "b"]), "x")} == {"train"}
    assert sorted(row.split for row in divide(rows_of(["a", "b", "c"]), "x")) == ["test", "train", "val"]


# Conversations.
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@divided
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_last_answer_of_a_conversation_is_the_target(tmp_path: Path, chat_tokenizer: Any, ending: str) -> None:
    (row,) = only(load_tasks(write(tmp_path / f"chats.{ending}", [{"messages": CHAT, "id": "x"}])))
    assert row.target == "4"
    assert row.source == "System: Be brief.\nUser: Hi\nAssistant: Hello\nUser: 2 + 2?\nAssistant:"
    assert row.extra == {"id": "x"}
    example = make_template("chat", chat_tokenizer).encode(row.prompt, row.target)
    rendered = chat_tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, tokenize=False)
    assert chat_tokenizer.decode(example.prompt_ids) == rendered
    assert chat_tokenizer.decode(example.target_ids) == "4<|end|>"


@divided
def test_a_single_question_is_an_ordinary_prompt(tmp_path: Path, chat_tokenizer: Any) -> None:
    (row,) = only(load_tasks(write(tmp_path / "chats.jsonl", [{"messages": CHAT[3:]}])))
    assert row.source == "2 + 2?"
    plain = make_template("plain", chat_tokenizer)
    assert plain.encode(row.prompt, row.target) == plain.encode("2 + 2?", "4")
    encoded = make_template("chat", chat_tokenizer).encode(row.prompt, row.target)
    assert chat_tokenizer.decode(encoded.prompt_ids) == "<user>2 + 2?<assistant>"


def test_a_plain_conversation_over_a_base_with_a_chat_template_is_said(
    chat_tokenizer: Any, tiny_tokenizer: Any
) -> None:
    talk = Conversation((("system", "Be brief."), ("user", "Hi")))
    with pytest.warns(UserWarning, match="--template chat"):
        ids = make_template("plain", chat_tokenizer).encode_prompt(talk)
    assert ids == make_template("plain", tiny_tokenizer).encode_prompt("System: Be brief.\nUser: Hi\nAssistant:")


def test_conversations_that_read_alike_and_differ_have_other_hashes() -> None:
    one = Row("t", "train", "s", "a", turns=(("user", "x"), ("assistant", "y")))
    other = Row("t", "train", "s", "a", turns=(("user", "x"), ("tool", "y")))
    assert one.canonical_json() != other.canonical_json()
    assert "turns" not in Row("t", "train", "s", "a").canonical_json()


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("hi", "must be a list of turns"),
        ([], "must be a list of turns"),
        (CHAT[:2], "must end with an answer"),
        (CHAT[-1:], "must end with an answer .* to an earlier turn"),
        ([*CHAT[:1], "x"], "turn 1 of 'messages' must be an object"),
        ([{"role": "user", "content": ["x"]}, CHAT[-1]], "turn 0 of 'messages': 'content' must be"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}, CHAT[-1]], r"alone.*\nfound: tool_calls"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, messages: object, match: str) -> None:
    with pytest.raises(TaskError, match=f"(?s)row 0.*{match}"):
        load_tasks(write(tmp_path / "chats.jsonl", [{"messages": messages}]))


def test_a_template_that_refuses_a_role_names_the_turns(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    template = make_template("chat", chat_tokenizer)
    with pytest.raises(UsageError, match="must take turns of system, user"):
        template.encode_prompt(Conversation((("system", "a"), ("user", "b"))))
