"""Tasks by reference: files, folders, manifests, names."""

import json
from pathlib import Path

import pytest

from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError


def row(task: str, split: str = "train", **more: object) -> dict[str, object]:
    return {"task": task, "split": split, "source": f"{task} {split}", "target": "yes", **more}


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def write_manifest(folder: Path, *entries: dict[str, object]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"tasks": entries, "seed": 0}))


def test_a_file_may_hold_several_tasks_and_they_come_sorted_by_name(tmp_path):
    path = write(tmp_path / "all.jsonl", row("b"), row("a", "test"), row("b", "val"))
    tasks = load_tasks(path)
    assert list(tasks) == ["a", "b"]
    assert [len(tasks["b"].split(split)) for split in ("train", "val", "test")] == [1, 1, 0]
    assert (tasks["a"].role, tasks["b"].role) == ("heldout", "train")
    assert list(load_tasks(str(path), names=["b"])) == ["b"]


def test_a_folder_of_files_is_read_whole(tmp_path):
    write(tmp_path / "one.jsonl", row("a"), row("b"))
    write(tmp_path / "two.jsonl", row("c"))
    assert list(load_tasks(tmp_path)) == ["a", "b", "c"]
    assert list(load_tasks(tmp_path, names=["c", "b", "c"])) == ["b", "c"]


def test_only_the_files_named_after_the_tasks_are_read_where_that_is_enough(tmp_path):
    write(tmp_path / "a.jsonl", row("a"))
    (tmp_path / "b.jsonl").write_text("not read")
    assert list(load_tasks(tmp_path, names=["a"])) == ["a"]
    with pytest.raises(TaskError, match=r"b\.jsonl:1"):
        load_tasks(tmp_path)


def test_a_file_named_after_another_task_does_not_hide_the_task(tmp_path):
    write(tmp_path / "a.jsonl", row("b"))
    write(tmp_path / "z.jsonl", row("a"))
    assert load_tasks(tmp_path, names=["a"])["a"].split("train")[0].source == "a train"


def test_a_task_in_two_files_is_refused_by_both_names(tmp_path):
    write(tmp_path / "one.jsonl", row("a"))
    write(tmp_path / "two.jsonl", row("a"))
    with pytest.raises(TaskError, match=r"'a' must be defined in one file\nfound: .*one\.jsonl and .*two\.jsonl"):
        load_tasks(tmp_path)


def test_a_manifest_gives_family_role_and_metric_and_its_other_keys_are_notes(tmp_path):
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows/a.jsonl", row("a"))
    write(tmp_path / "stray.jsonl", row("stray"))
    write_manifest(
        tmp_path,
        {"task": "a", "family": "f", "role": "heldout", "metric": "rougeL", "file": "rows/a.jsonl", "n_train": 1},
    )
    tasks = load_tasks(tmp_path)
    assert list(tasks) == ["a"]
    assert (tasks["a"].family, tasks["a"].role, tasks["a"].metric) == ("f", "heldout", "rougeL")


def test_a_manifest_may_say_as_little_as_task_and_file(tmp_path):
    write(tmp_path / "a.jsonl", row("a", family="f", options=["yes", "no"]), row("b"))
    write_manifest(tmp_path, {"task": "a", "file": "a.jsonl"}, {"task": "b", "file": "a.jsonl"})
    tasks = load_tasks(tmp_path)
    assert (tasks["a"].family, tasks["a"].role, tasks["a"].metric) == ("f", "train", "acc")
    assert (tasks["b"].family, tasks["b"].role, tasks["b"].metric) == ("none", "train", "em")


@pytest.mark.parametrize("role", ["held_out", "held-out", "training", "Heldout"])
def test_a_slip_in_a_role_is_refused_since_it_would_keep_nothing_apart(tmp_path, role):
    write(tmp_path / "a.jsonl", row("a"))
    write_manifest(tmp_path, {"task": "a", "file": "a.jsonl", "role": role})
    with pytest.raises(TaskError, match=f"the role of task 'a' must be spelt train or heldout.*\nfound: '{role}'"):
        load_tasks(tmp_path)


def test_a_role_of_its_own_is_neither(tmp_path):
    write(tmp_path / "a.jsonl", row("a"))
    write_manifest(tmp_path, {"task": "a", "file": "a.jsonl", "role": "p3"})
    assert load_tasks(tmp_path)["a"].role == "p3"


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    write(tmp_path / "a.jsonl", row("a"))
    write_manifest(tmp_path, {"task": "a", "file": "a.jsonl", "role": "heldout"})
    file = tmp_path / "manifest.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_tasks(tmp_path)["a"].role == "heldout"


def test_only_the_files_of_the_named_tasks_are_read_through_a_manifest(tmp_path):
    write(tmp_path / "a.jsonl", row("a"))
    (tmp_path / "b.jsonl").write_text("not read")
    write_manifest(tmp_path, {"task": "a", "file": "a.jsonl"}, {"task": "b", "file": "b.jsonl"})
    assert list(load_tasks(tmp_path, names=["a"])) == ["a"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", r"manifest\.json: the text must be valid JSON"),
        ("[]", r"must be an object with a list 'tasks'"),
        ('{"tasks": []}', r"must be an object with a list 'tasks'"),
        ('{"tasks": ["a"]}', r"tasks\[0\]: an entry must be an object"),
        ('{"tasks": [{"file": "a.jsonl"}]}', r"tasks\[0\]: 'task' must be a non-empty text\nfound: None"),
        ('{"tasks": [{"task": "a", "file": 3}]}', r"tasks\[0\]: 'file' must be a non-empty text\nfound: 3"),
        ('{"tasks": [{"task": "a", "file": "a.jsonl", "role": 1}]}', r"tasks\[0\]: 'role' must be"),
        ('{"tasks": [{"task": "a", "file": "no.jsonl"}]}', r"the file of task 'a' must exist\nfound: .*no\.jsonl"),
        ('{"tasks": [{"task": "b", "file": "a.jsonl"}]}', r"every task of a file must stand in .*\nfound: 'a'"),
        ('{"tasks": [{"task": "a", "file": "a.jsonl"}, {"task": "a", "file": "a.jsonl"}]}', r"listed once\nfound: 'a'"),
        ('{"tasks": [{"task": "a", "file": "a.jsonl", "family": "g"}]}', r"one family\nfound: f, g"),
        (
            '{"tasks": [{"task": "a", "file": "a.jsonl"}, {"task": "b", "file": "a.jsonl"}]}',
            r"a\.jsonl: task 'b' must have rows",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, manifest, message):
    write(tmp_path / "a.jsonl", row("a", family="f"))
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(TaskError, match=message):
        load_tasks(tmp_path)


def test_an_unknown_name_is_refused_with_near_matches(tmp_path):
    path = write(tmp_path / "all.jsonl", row("sentiment"), row("topic"))
    with pytest.raises(UsageError, match=r"its 2 tasks\nfound: 'sentimant'\nremedy: did you mean sentiment\?"):
        load_tasks(path, names=["topic", "sentimant"])
    with pytest.raises(UsageError, match=r"there are, for example, sentiment, topic"):
        load_tasks(path, names=["xyz"])
    with pytest.raises(UsageError, match="last_word"):
        load_tasks("builtin", names=["last_wort"])


def test_an_empty_file_is_refused_by_name(tmp_path):
    with pytest.raises(TaskError, match=r"empty\.jsonl: a task must have rows"):
        load_tasks(write(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("reference", ["none.jsonl", "folder/none.jsonl", "/none/at/all", "none", ".", ""])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_network(tmp_path, monkeypatch, reference):
    monkeypatch.setattr("lorary.data.hub._load", lambda reference: pytest.fail("asked for a data set"))
    monkeypatch.chdir(tmp_path)
    if reference in (".", ""):
        with pytest.raises(TaskError, match=r"a folder of tasks must hold"):
            load_tasks(reference)
        return
    with pytest.raises(UsageError, match=f"must be 'builtin', a file or folder that exists.*\nfound: {reference}"):
        load_tasks(reference)


def test_a_mistyped_path_under_a_folder_that_exists_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("lorary.data.hub._load", lambda reference: pytest.fail("asked for a data set"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="check the path"):
        load_tasks("data/taks")


def test_an_id_is_asked_for_only_where_no_such_path_exists(tmp_path, monkeypatch):
    monkeypatch.setattr("lorary.data.tasks.read_dataset", lambda reference: pytest.fail("asked for a data set"))
    (tmp_path / "user/name").mkdir(parents=True)
    write(tmp_path / "user/name/a.jsonl", row("a"))
    monkeypatch.chdir(tmp_path)
    assert list(load_tasks("user/name")) == ["a"]
