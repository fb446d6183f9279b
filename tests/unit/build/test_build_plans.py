"""What a build makes is planned before anything is trained: units, their settings, their rows, their shards."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.build.cluster_settings import ClusterSettings, parse_k
from lorary.build.jobs import (
    check_trainable,
    cluster_units,
    joint_units,
    make_job,
    num_steps,
    override,
    private_units,
    read_overrides,
)
from lorary.build.methods import method_settings
from lorary.build.settings import (
    BuildSettings,
    RunSettings,
    as_recorded,
    parse_sampling,
    preset,
    recorded_settings,
)
from lorary.build.state import build_key, close_build, cut, open_shards
from lorary.data.schema import Row, Task, make_task
from lorary.data.template import make_template
from lorary.errors import LoraryError, UsageError

SETTINGS = BuildSettings(steps=7, batch_size=2)


def task(name: str, train: int = 4, val: int = 2) -> Task:
    rows = [Row(name, split, f"{name} {i}", name) for split, n in (("train", train), ("val", val)) for i in range(n)]
    return make_task(name, rows, "here")


def test_private_is_the_identity_and_joint_is_one_column() -> None:
    assert [(unit.name, unit.tasks) for unit in private_units(["b", "a"], SETTINGS)] == [("a", ("a",)), ("b", ("b",))]
    assert [(unit.name, unit.tasks) for unit in joint_units(["b", "a"], SETTINGS)] == [("joint", ("a", "b"))]


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 4), min_size=1))
def test_clusters_give_every_task_to_exactly_one_expert(labels: dict[str, int]) -> None:
    units = cluster_units(labels, SETTINGS, {name: f"hash of {name}" for name in labels}, {"by": "mbc"})
    assert sorted(name for unit in units for name in unit.tasks) == sorted(labels)
    for unit in units:
        assert {f"cluster_{labels[name]}" for name in unit.tasks} == {unit.name}
        assert unit.parents == tuple(f"hash of {name}" for name in unit.tasks)


def test_steps_are_those_of_the_expert_and_epochs_go_over_the_union() -> None:
    tasks = {"a": task("a", 5), "b": task("b", 8)}
    (joint,) = joint_units(tasks, SETTINGS)
    assert num_steps(joint, tasks) == 7
    (joint,) = joint_units(tasks, BuildSettings(steps=None, epochs=2.0, batch_size=4))
    assert num_steps(joint, tasks) == 7  # 2 * 13 / 4, rounded up
    (joint,) = joint_units(tasks, BuildSettings(steps=None, epochs=2.0, batch_size=4, train_rows=4))
    assert num_steps(joint, tasks) == 4


def test_a_job_of_several_tasks_numbers_its_rows(tiny_tokenizer: Any) -> None:
    tasks = {"a": task("a", 3), "b": task("b", 5)}
    (joint,) = joint_units(tasks, SETTINGS)
    template = make_template("plain", tiny_tokenizer)
    job = make_job(joint, tasks, template, None)
    assert (len(job.train), len(job.val)) == (8, 4)
    assert (tuple(job.train_tasks), tuple(job.val_tasks)) == ((0,) * 3 + (1,) * 5, (0, 0, 1, 1))
    assert job.task_weights == ()  # proportional: the union as it is
    assert make_job(private_units(["a"], SETTINGS)[0], tasks, template, None).train_tasks == ()


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [("proportional", ()), ("uniform", (0.5, 0.5)), (1.0, (0.1, 0.9)), (2.0, (0.25, 0.75))],
)
def test_sampling_weighs_tasks_by_rows_to_the_power_of_one_over_the_temperature(
    sampling: str | float, weights: tuple[float, ...]
) -> None:
    assert BuildSettings(sampling=sampling).task_weights([10, 90]) == pytest.approx(weights)
    assert BuildSettings(sampling=sampling).task_weights([10]) == ()


def test_the_coldest_sampling_of_large_tasks_is_still_finite() -> None:
    weights = BuildSettings(sampling=0.05).task_weights([10**6, 10**7, 10**7])
    assert all(0 < weight < 1 for weight in weights)
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("sampling", ["even", 0.0, 0.01, -1.0, float("nan"), float("inf")])
def test_sampling_that_is_no_word_and_no_temperature_is_refused(sampling: str | float) -> None:
    with pytest.raises(UsageError, match="--sampling"):
        BuildSettings(sampling=sampling)


def test_words_of_the_command_line_become_settings() -> None:
    assert [parse_sampling(text) for text in (None, "uniform", "2", "x")] == [None, "uniform", 2.0, "x"]
    assert [parse_k(text) for text in ("auto", "7", "5,10")] == [(), (7,), (5, 10)]
    with pytest.raises(UsageError, match="--k"):
        parse_k("many")


def test_settings_recorded_before_a_key_was_there_had_its_default() -> None:
    old = {key: value for key, value in as_recorded(SETTINGS).items() if key not in ("patience", "sampling")}
    assert recorded_settings(old) == as_recorded(SETTINGS)
    assert json.loads(json.dumps(as_recorded(SETTINGS))) == as_recorded(SETTINGS)


def test_the_private_pass_is_shorter_than_that_of_the_clusters() -> None:
    paper, steps = preset("paper-2024"), BuildSettings(steps=61)
    assert ClusterSettings().private_settings(paper).epochs == 2.0
    assert ClusterSettings().private_settings(steps).steps == 30
    assert ClusterSettings(private_steps=5).private_settings(paper).num_steps(100) == 5
    assert ClusterSettings(private_epochs=1.0).private_settings(steps).num_steps(16) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClusterSettings(k=(0,)), "--k"),
        (lambda: ClusterSettings(k=(5, 5)), "--k"),
        (lambda: ClusterSettings(k=(), by="random"), "--k auto"),
        (lambda: ClusterSettings(by="size"), "--cluster-by"),
        (lambda: ClusterSettings(method="pca"), "--cluster-method"),
        (lambda: ClusterSettings(private_steps=1, private_epochs=1.0), "--private-steps"),
        (lambda: RunSettings(window=0), "--window"),
        (
            lambda: RunSettings(max_tokens="all"),
            "--max-tokens must be a whole number\nfound: 'all'\nremedy: .* or auto",
        ),
        (lambda: RunSettings(max_tokens=0), "--max-tokens"),
        (lambda: RunSettings(logs=("paper",)), "--log"),
        (lambda: BuildSettings(patience=0), "--patience"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_overrides_change_single_experts_and_nothing_else() -> None:
    changes: dict[str, dict[str, Any]] = {
        "a": {"rank": 8, "alpha": 3, "epochs": 2, "target_modules": ["q_proj"]},
        "b": {"steps": 1},
    }
    a, b, c = override(private_units(["a", "b", "c"], SETTINGS), changes)
    assert (a.settings.rank, a.settings.alpha, a.settings.target_modules) == (8, 3.0, ("q_proj",))
    assert (a.settings.steps, a.settings.epochs) == (None, 2.0)
    assert (b.settings.steps, b.settings.rank) == (1, SETTINGS.rank)
    assert c.settings == SETTINGS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"z": {"rank": 1}}, "z"),
        ({"a": {"learning_rate": 1.0}}, "learning_rate"),
        ({"a": {"rank": 0}}, "'a'.*"),
        ({"a": {"rank": 1.5}}, "whole number"),
        ({"a": {"rank": "8"}}, "whole number"),
        ({"a": {"steps": 1, "epochs": 1}}, "'a'"),
        ({"a": {"alpha": None}}, "'a'"),
        ({"a": {"target_modules": "q_proj"}}, "list"),
        ({"a": {"steps": True}}, "steps as a whole number"),
        ({"a": {"alpha": True}}, "alpha as a number"),
        ({"a": {"upper_layers": 1.5}}, "or null"),
    ],
)
def test_overrides_that_fit_no_expert_are_refused(changes: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        override(private_units(["a"], SETTINGS), changes)


def test_an_override_may_ask_for_all_layers() -> None:
    (a,) = override(private_units(["a"], BuildSettings(upper_layers=2)), {"a": {"upper_layers": None}})
    assert a.settings.upper_layers is None


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("mbc", {"by": "random", "private": "lib"}, "--private needs --cluster-by mbc"),
        ("mbc", {"by": "text", "private_steps": 3}, "--private-steps needs --cluster-by mbc"),
        ("mbc", {"by": "family", "private_epochs": 1.0}, "--private-epochs needs --cluster-by mbc"),
        ("mbc", {"by": "text", "method": "delta"}, "--cluster-method needs --cluster-by mbc"),
        ("mbc", {"by": "family", "seed": 1}, "--cluster-seed needs --cluster-by mbc or random or text"),
        ("private", {"sampling": "uniform"}, "--sampling needs --method joint"),
        ("joint", {"k": "3"}, "--k needs --method mbc"),
        ("mbc", {"by": "size"}, "--cluster-by must be one of"),
    ],
)
def test_an_option_that_nothing_would_look_at_is_refused(method: str, given: dict[str, Any], words: str) -> None:
    sampling = given.pop("sampling", None)
    with pytest.raises(UsageError, match=words):
        method_settings(method, "default", None, mbc=given, poly={}, mu=False, per_task=False, sampling=sampling)


def test_the_preset_of_the_paper_is_no_option_that_was_given() -> None:
    made = method_settings("mbc", "paper-2024", None, mbc={"by": "random"}, poly={}, mu=False, per_task=False)
    assert made.clusters.by == "random"


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{"])
def test_a_file_of_overrides_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(UsageError, match=r"o\.json"):
        read_overrides(tmp_path / "o.json")
    with pytest.raises(UsageError, match=r"missing\.json"):
        read_overrides(tmp_path / "missing.json")


def test_tasks_without_rows_or_with_impossible_names_are_refused_before_anything_is_loaded() -> None:
    for broken, words in ((task("a", val=0), "val"), (task("a", train=0), "train"), (task(".a"), "name")):
        with pytest.raises(LoraryError, match=words):
            check_trainable({broken.name: broken})


@given(st.lists(st.text("ab", max_size=4), unique=True), st.integers(1, 7))
def test_shards_hold_every_expert_once_and_none_is_empty(names: list[str], number: int) -> None:
    shards = cut(names, number)
    assert sorted(name for shard in shards for name in shard) == sorted(names)
    assert all(shards)
    assert max(map(len, shards), default=0) - min(map(len, shards), default=0) <= 1


def test_an_interrupted_build_goes_on_with_the_shards_it_began_with(tmp_path: Path) -> None:
    began = open_shards(tmp_path, "key", ["a", "b", "c", "d"], 2)
    assert began == [["a", "c"], ["b", "d"]]
    # `a` was committed meanwhile; its shard keeps it for the sake of its company. The other shard is done.
    assert open_shards(tmp_path, "key", ["c"], 1) == [["a", "c"]]
    assert open_shards(tmp_path, "other", ["c"], 1) == [["c"]]
    # An expert that was there at first was removed since: the shards do not cover it.
    assert open_shards(tmp_path, "key", ["c", "e"], 1) == [["c", "e"]]
    close_build(tmp_path, "key")
    assert [path.name for path in (tmp_path / ".build").iterdir()] == ["other.json"]


def test_a_build_is_keyed_by_all_that_decides_its_company() -> None:
    tasks = {name: task(name) for name in "ab"}
    units = private_units(tasks, SETTINGS)
    keys = [
        build_key(units, tasks, 2, "float32"),
        build_key(units[:1], tasks, 2, "float32"),
        build_key(units, tasks, 3, "float32"),
        build_key(units, tasks, 2, "float64"),
        build_key(units, {**tasks, "b": task("b", 5)}, 2, "float32"),
        build_key(private_units(tasks, BuildSettings(steps=8, batch_size=2)), tasks, 2, "float32"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == build_key(private_units(tasks, SETTINGS), dict(reversed(tasks.items())), 2, "float32")


def test_a_file_of_overrides_that_would_never_end_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "o.json")
    with pytest.raises(UsageError, match=r"o\.json\nfound: .*not a regular file"):
        read_overrides(tmp_path / "o.json")
    (tmp_path / "twice.json").write_text('{"a": {"rank": 4}, "a": {"rank": 8}}')
    with pytest.raises(UsageError, match="the key 'a' stands in it twice"):
        read_overrides(tmp_path / "twice.json")
