"""The paper's tasks, out of copies laid out as the public data sets are."""

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest

from lorary.data.suites.bbh import NUM_SHOTS, SUBTASKS
from lorary.data.suites.flan import chosen_rows
from lorary.data.suites.flan_names import FLAN_TASKS
from lorary.data.suites.public import read_public
from lorary.data.suites.sni import SNI_TASKS
from lorary.data.suites.zero_shot import RECIPES, ZERO_SHOT
from lorary.data.tasks import load_tasks
from lorary.errors import TaskError, UsageError
from lorary.evaluate.metrics import find_metric
from lorary.evaluate.options import scored_pairs
from lorary.evaluate.sandbox import Sandbox


@pytest.fixture(autouse=True)
def no_bars() -> None:
    datasets.disable_progress_bars()


ARC = {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"}
ROWS: dict[str, dict[str, Any]] = {
    "arc_challenge": ARC | {"choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "1"},
    "arc_easy": ARC,
    "boolq": {"passage": "Snow is white.", "question": "is snow white", "label": 1, "idx": 0},
    "hellaswag": {
        "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting", "label": "2", "ind": 4,
        "endings": ["[header] Sit down [title] Take a chair", "runs  away.", "stands up.", "flies."],
    },
    "humaneval": {
        "task_id": "HumanEval/0", "prompt": "\n\ndef one():\n    '''One.'''\n", "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one",
    },
    "mbpp": {
        "task_id": 2, "prompt": "Write one.", "code": "def one():\n    return 1", "source_file": "x",
        "test_imports": ["import math"], "test_list": ["assert one() == 1", "assert one() < 2"],
    },
    "openbookqa": ARC | {"question_stem": "Fire is", "answerKey": "B"},
    "piqa": {"goal": "Open a jar", "sol1": "twist it", "sol2": "eat it", "label": 0},
    "winogrande": {
        "sentence": "The trophy did not fit the case: the _ was too big.", "option1": "case", "option2": "trophy",
        "answer": "2",
    },
}  # fmt: skip


def put(copies: Path, task: str, *rows: dict[str, Any]) -> None:
    """A copy as the Hub lays it out: a folder per configuration, files named after their split."""
    source = RECIPES[task].source
    folder = copies / source.name / (source.config or "")
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_parquet(folder / f"{source.split}-00000-of-00001.parquet")


def put_bbh(copies: Path, num_rows: int = 7) -> None:
    for name in SUBTASKS:
        folder = copies / "SaylorTwift/bbh" / name
        folder.mkdir(parents=True)
        rows = [{"input": f"{name} {i}?", "target": f"({i})"} for i in range(num_rows)]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def one(copies: Path, task: str) -> Any:
    loaded = load_tasks(f"zero-shot@{copies}", names=[task])[task]
    assert (loaded.name, loaded.role, loaded.family) == (task, "heldout", "zero-shot")
    [row] = loaded.split("test")
    return row


@pytest.mark.parametrize(
    ("task", "source", "options", "target"),
    [
        ("arc_easy", "Question: Which is hot?\nAnswer:", ("ice", "fire"), "fire"),
        ("arc_challenge", "Question: Which is hot?\nAnswer:", ("ice", "fire"), "ice"),
        ("piqa", "Question: Open a jar\nAnswer:", ("twist it", "eat it"), "twist it"),
        ("boolq", "Snow is white.\nQuestion: is snow white?\nAnswer:", ("no", "yes"), "yes"),
        (
            "hellaswag",
            "Sitting: A man sits. He",
            (" Sit down. Take a chair", "runs away.", "stands up.", "flies."),
            "stands up.",
        ),
        ("openbookqa", "Fire is", ("ice", "fire"), "fire"),
    ],
)
def test_a_task_asks_as_the_paper_asks(
    task: str, source: str, options: tuple[str, ...], target: str, tmp_path: Path
) -> None:
    put(tmp_path, task, ROWS[task])
    row = one(tmp_path, task)
    assert (row.source, row.options, row.target) == (source, options, target)


def test_winogrande_scores_the_end_of_the_sentence_after_each_option(tmp_path: Path) -> None:
    put(tmp_path, "winogrande", ROWS["winogrande"])
    row = one(tmp_path, "winogrande")
    begin = "The trophy did not fit the case: the"
    assert scored_pairs(row) == [(f"{begin} case", "was too big."), (f"{begin} trophy", "was too big.")]
    assert row.target == "trophy"


@pytest.mark.parametrize(
    ("task", "source", "test"),
    [
        ("humaneval", "def one():\n    '''One.'''\n", "def check(f):\n    assert f() == 1\n"),
        (
            "mbpp",
            'def one():\n\t"""\n\tWrite one.\n\tassert one() == 1\n\tassert one() < 2\n\t"""\n',
            ["import math", "assert one() == 1", "assert one() < 2"],
        ),
    ],
)
def test_programs_are_asked_for_and_cut_as_in_the_paper(task: str, source: str, test: Any, tmp_path: Path) -> None:
    put(tmp_path, task, ROWS[task])
    row = one(tmp_path, task)
    assert (row.source, row.extra["test"]) == (source, test)
    assert row.extra["generation"] == {
        "max_new_tokens": 300, "stop": ["\n\n", "\ndef"], "temperature": 0.05, "top_p": 0.95
    }  # fmt: skip
    find_metric("pass@1", "code").check([row], Sandbox("none"))


def test_the_suite_of_ten_is_whole_and_no_shot_of_bbh_is_scored(tmp_path: Path) -> None:
    put_bbh(tmp_path)
    for name, row in ROWS.items():
        put(tmp_path, name, row)
    tasks = load_tasks(f"zero-shot@{tmp_path}")
    assert tuple(tasks) == ZERO_SHOT
    assert len(tasks) == 10
    for name, task in tasks.items():
        find_metric(task.metric, name)

    bbh = tasks["bbh"]
    assert (bbh.metric, bbh.role) == ("em_normalised", "heldout")
    assert len(bbh.split("train")) == NUM_SHOTS * len(SUBTASKS)
    assert len(bbh.split("test")) == 2 * len(SUBTASKS)
    asked = {row.source.split("\n\n")[-1] for row in bbh.split("test")}
    assert not asked & {row.source for row in bbh.split("train")}
    first = bbh.split("test")[0]
    assert first.source.startswith(
        "Solve the following problem: boolean_expressions 0?\nAnswer: (0)\n\nSolve the following problem: "
    )
    assert first.source.endswith("(4)\n\nSolve the following problem: boolean_expressions 5?\nAnswer:")
    # The first rows come from all subtasks.
    assert [row.extra["subtask"] for row in bbh.split("test")[: len(SUBTASKS)]] == list(SUBTASKS)


def test_a_copy_may_name_its_files_in_a_readme_as_on_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "baber/piqa"
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list([ROWS["piqa"]]).to_parquet(folder / "data/rows.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: validation\n    path: data/rows.parquet\n---\n"
    )
    assert one(tmp_path, "piqa").target == "twist it"


def test_rows_that_cannot_be_scored_are_left_out_and_counted(tmp_path: Path) -> None:
    same = ROWS["piqa"] | {"sol1": "the same", "sol2": "the same"}
    put(tmp_path, "piqa", same, ROWS["piqa"])
    with pytest.warns(UserWarning, match=r"task 'piqa': 1 of 2 rows of baber/piqa, split 'validation' were left out"):
        assert one(tmp_path, "piqa").target == "twist it"
    put(tmp_path, "piqa", same)
    with pytest.raises(TaskError, match="task 'piqa' must have rows that follow the format"):
        one(tmp_path, "piqa")


def test_an_option_that_stands_twice_is_ranked_once(tmp_path: Path) -> None:
    put(tmp_path, "hellaswag", ROWS["hellaswag"] | {"endings": ["a.", "b.", "a.", "c."]})
    assert one(tmp_path, "hellaswag").options == ("a.", "b.", "c.")


@pytest.mark.parametrize(
    ("task", "changes", "found"),
    [
        ("piqa", {"label": -1}, "right option -1 of 2"),
        ("arc_easy", {"answerKey": "E"}, "'E' is not in list"),
        ("winogrande", {"sentence": "No gap."}, "nothing after the gap"),
        ("winogrande", {"answer": ""}, "invalid literal"),
    ],
)
def test_a_row_without_its_answer_is_refused_by_place(
    task: str, changes: dict[str, Any], found: str, tmp_path: Path
) -> None:
    put(tmp_path, task, ROWS[task], ROWS[task] | changes)
    with pytest.raises(TaskError, match=rf"{RECIPES[task].source.name}.*, row 1: a row must be laid out(.|\n)*{found}"):
        load_tasks(f"zero-shot@{tmp_path}", names=[task])


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    row = {key: value for key, value in ROWS["piqa"].items() if key != "goal"}
    put(tmp_path, "piqa", row)
    with pytest.raises(TaskError, match=r"must have the columns goal, label, sol1, sol2\nfound: no goal among"):
        one(tmp_path, "piqa")


def test_a_copy_that_is_not_there_is_refused_with_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"must lie below(.|\n)*hf download allenai/openbookqa --repo-type dataset"):
        one(tmp_path, "openbookqa")


def test_the_hub_is_asked_where_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list([ROWS["boolq"]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_tasks("zero-shot", names=["boolq"])["boolq"].split("test")[0].target == "yes"
    assert asked == [(("aps/super_glue", "boolq"), {"split": "validation"})]


def test_a_hub_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(TaskError, match=r"data set baber/piqa(.|\n)*SUITE@FOLDER"):
        load_tasks("zero-shot", names=["piqa"])


def test_an_unknown_task_of_a_suite_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match=r"its 10 tasks\nfound: 'arc_esy'\nremedy: did you mean arc_easy\?"):
        load_tasks("zero-shot", names=["arc_esy"])
    with pytest.raises(UsageError, match="its 256 tasks"):
        load_tasks("flan-256@nowhere", names=["arc_easy"])
    with pytest.raises(UsageError, match=r"a suite \(zero-shot, sni-12, flan-256\)"):
        load_tasks("zero-shots")


def test_a_folder_of_the_name_of_a_suite_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "zero-shot"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"task": "a", "split": "test", "source": "s", "target": "t"}\n')
    monkeypatch.chdir(tmp_path)
    assert list(load_tasks("zero-shot")) == ["a"]


def put_sni(copies: Path, name: str, instances: list[dict[str, Any]]) -> None:
    folder = copies / "allenai/natural-instructions/tasks"
    folder.mkdir(parents=True, exist_ok=True)
    document = {"Definition": ["Answer the question"], "Instances": instances, "Positive Examples": []}
    (folder / f"{name}.json").write_text(json.dumps(document))


def test_sni_takes_a_hundred_instances_and_all_their_references(tmp_path: Path) -> None:
    name = "task242_tweetqa_classification"
    instances = [{"id": f"x-{i}", "input": f"Why {i}", "output": ["so", f"so {i}", "so"]} for i in range(203)]
    put_sni(tmp_path, name, instances)
    task = load_tasks(f"sni-12@{tmp_path}", names=[name])[name]
    assert [len(task.split(part)) for part in ("test", "val", "train")] == [100, 100, 3]
    assert task.metric == "rougeL_single"
    row = task.split("test")[7]
    assert row.source == (
        "Task definition: Answer the question.\nNow complete the following example -\nInput: Why 7.\nOutput:"
    )
    assert row.references == ("so", "so 7")


def test_sni_of_the_hub_gathers_the_references_of_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    name = SNI_TASKS[0]
    rows = [
        {"task_name": task, "definition": "Do it!", "inputs": text, "targets": target, "id": "x"}
        for task, text, target in [(name, "a", "1"), (name, "a", "2"), ("task1_other", "a", "3"), (name, "b", "4")]
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(rows))
    task = load_tasks("sni-12", names=[name])[name]
    assert [row.references for row in task.split("test")] == [("1", "2"), ("4",)]
    assert task.split("test")[0].source.startswith("Task definition: Do it!\n")
    with pytest.raises(TaskError, match=f"must hold the task '{SNI_TASKS[1]}'"):
        load_tasks("sni-12", names=[SNI_TASKS[1]])


def test_a_task_of_sni_that_is_not_there_is_refused_by_its_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task1557_jfleg(.|\n)*FileNotFoundError(.|\n)*clone the repository"):
        load_tasks(f"sni-12@{tmp_path}", names=["task1557_jfleg_answer_generation"])


def test_the_names_of_flan_are_those_of_the_paper() -> None:
    names = sorted(FLAN_TASKS)
    assert len(names) == 256
    # The sorted names of the list flan256 in microsoft/mttl, commit 6ee54e6c3acbd0515732795660df504572947341.
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest == "41e65de8789b3f4f654a10f633dd7417c49b578420a5c86ec9f64900c8d1af10"
    assert FLAN_TASKS["race_high_Taking_a_test"] == "race_high"
    assert FLAN_TASKS["true_case"] == "true_case"


def put_flan(copies: Path, **rows: int) -> None:
    """Rows of several tasks, mixed, under the names of the data set."""
    folder = copies / "chiayewken/flan-v2"
    folder.mkdir(parents=True)
    names = [name for name, number in rows.items() for _ in range(number)]
    order = numpy.random.default_rng(0).permutation(len(names))
    listed = [
        {
            "source": f"row {i}", "target": f"{i}", "task_name": names[i].replace("glue_sst2_2_0_0", "glue/sst2:2.0.0"),
            "task_source": "Flan2021", "template_type": "zs", "template_idx": 0,
        }
        for i in order
    ]  # fmt: skip
    datasets.Dataset.from_list(listed).to_parquet(folder / "train-00000-of-00001.parquet")


def test_flan_is_cut_and_split_as_a_plain_loop_over_datasets_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.data.suites.flan.MOST_ROWS", 50)
    monkeypatch.setattr("lorary.data.suites.flan.SCAN_ROWS", 33)
    put_flan(tmp_path, glue_sst2_2_0_0=80, true_case=30, other=20)
    tasks = load_tasks(f"flan-256@{tmp_path}", names=["glue_sst2_2_0_0", "true_case"])
    whole = datasets.load_dataset(str(tmp_path / "chiayewken/flan-v2"), split="train")
    for name, raw in (("glue_sst2_2_0_0", "glue/sst2:2.0.0"), ("true_case", "true_case")):
        expected = whole.filter(lambda row, raw=raw: row["task_name"] == raw).shuffle(42)
        expected = expected.select(range(min(50, len(expected))))

        def split(row: dict[str, Any], i: int) -> dict[str, str]:
            draw = numpy.random.RandomState(i).rand()
            return {"split": "train" if draw < 0.8 else "val" if draw < 0.9 else "test"}

        expected = expected.map(split, with_indices=True).shuffle(42)
        for part in ("train", "val", "test"):
            found = [row.source for row in tasks[name].split(part)]
            assert found == [row["source"] for row in expected if row["split"] == part]
        assert (tasks[name].role, tasks[name].metric) == ("train", "rougeL")
    assert tasks["glue_sst2_2_0_0"].family == "glue"


def test_flan_has_about_a_thousand_validation_rows_a_task() -> None:
    _, splits = chosen_rows(12_000)
    assert len(splits) == 10_000
    assert [round(splits.count(part) / 100) for part in ("train", "val", "test")] == [80, 10, 10]


def test_a_task_that_flan_lacks_is_refused(tmp_path: Path) -> None:
    put_flan(tmp_path, true_case=3)
    with pytest.raises(TaskError, match="task 'fix_punct' must have rows"):
        load_tasks(f"flan-256@{tmp_path}", names=["fix_punct"])


def test_a_copy_in_the_users_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "data", "piqa", ROWS["piqa"])
    assert load_tasks("zero-shot@~/data", names=["piqa"])["piqa"].split("test")


def test_no_code_of_a_data_set_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: seen.append(options) or 1 / 0)
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        read_public(RECIPES["piqa"].source, ("goal",), None)
    assert seen == [{"split": "validation"}]
