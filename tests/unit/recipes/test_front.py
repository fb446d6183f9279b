"""Python's front door: functions that take what is at hand, give results back, and take what the commands take."""

import importlib
import importlib.util
import inspect
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.adapt.merge_settings import MergeSettings
from lorary.adapter import Adapter
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.errors import LibraryError, LoraryError, TaskError, UsageError
from lorary.evaluate.prompts import Prompt
from lorary.evaluate.settings import EvaluateSettings, ExplainSettings
from lorary.library.cluster_options import ClusterOptions
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.recipes.base_options import BaseOptions
from lorary.recipes.inputs import base_at_hand, library_of, tasks_of
from lorary.recipes.merge import run_merge
from lorary.tabular import Tabular

DOORS = {
    "evaluate": (EvaluateSettings, BaseOptions), "explain": (ExplainSettings, BaseOptions),
    "merge": (MergeSettings,), "cluster": (ClusterOptions,),
}  # fmt: skip
QUICK = {"routers": ["uniform", "arrow"], "rows": 1, "routing_rows": 0}


@pytest.fixture
def filled(library: Library, base: Base, random_adapter: Callable[..., Any], generator: torch.Generator) -> Library:
    """Four experts over the tiny base."""
    for name in ("a", "b", "c", "d"):
        library.add_adapter(random_adapter(base.model, name, generator), {"tasks": [name], "families": {name: "f"}})
    return library


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of two tasks with test rows, and one without."""
    rows = [
        {"task": name, "split": split, "source": f"{name} {i}:", "target": "up"}
        for name, split in (("a", "test"), ("z", "test"), ("q", "train"))
        for i in range(2)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def called(name: str, library: Any, file: Path, **more: Any) -> Any:
    """A door with the arguments that it needs."""
    needed: dict[str, tuple[Any, ...]] = {"evaluate": (file,), "explain": ("a 1:",)}
    quick: dict[str, dict[str, Any]] = {"evaluate": QUICK, "explain": {"max_new_tokens": 1, "most": 1}}
    return getattr(lorary, name)(library, *needed.get(name, ()), **{**quick.get(name, {}), **more})


@pytest.mark.parametrize("name", DOORS)
def test_a_library_and_its_path_give_the_same_result_which_shows_itself(name: str, filled: Library, file: Path) -> None:
    results = [called(name, library, file) for library in (filled, str(filled.path), filled.path)]
    for result in results:
        assert isinstance(result, Tabular)
        assert repr(result) == repr(results[0])
    result = results[0]
    assert "</table>" in result._repr_html_()
    assert len({len(record) for record in result.records()}) == 1
    assert len(repr(result)) < 5000
    if importlib.util.find_spec("pandas"):
        assert len(result.to_pandas()) == len(result.records()) > 0


@pytest.mark.parametrize("name", DOORS)
def test_every_setting_of_the_command_is_a_keyword(name: str) -> None:
    signature = inspect.signature(getattr(lorary, name))
    apart = {"route", "units", "top_k", "temperature", "mix"}  # of a routing setting
    for settings in DOORS[name]:
        assert set(inspect.signature(settings).parameters) - apart <= set(signature.parameters)
    assert [
        key for key in signature.parameters if f" {key}:" not in (inspect.getdoc(getattr(lorary, name)) or "")
    ] == []


@pytest.mark.parametrize(
    ("name", "wrong", "likely"),
    [("evaluate", "router", None), ("evaluate", "rowz", "rows"), ("evaluate", "topk", "top_k"),
     ("explain", "againts", "against"), ("explain", "units", None), ("merge", "weigths", "weights"),
     ("cluster", "sead", "seed")],
)  # fmt: skip
def test_an_unknown_keyword_is_refused(name: str, wrong: str, likely: str | None, filled: Library, file: Path) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{likely}'" if likely else "found: "):
        called(name, filled, file, **{wrong: 1})


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [("evaluate", {"rows": 0}, "--rows must be"), ("evaluate", {"routers": "arow"}, "a router must exist"),
     ("evaluate", {"top_k": 0}, "top_k"), ("evaluate", {"names": "nobody"}, "tasks named must be"),
     ("explain", {"most": -1}, "--most must be"), ("explain", {"without": "z"}, "must name experts"),
     ("explain", {"router": "arow"}, "a router must exist"), ("merge", {"method": "soup"}, "--method must be one of"),
     ("merge", {"experts": "a,e"}, "no adapter 'e'"), ("cluster", {"k": 0}, "--k must be"),
     ("cluster", {"method": "soup"}, "method must be one of")],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_as_by_the_command(
    name: str, fields: dict[str, Any], match: str, filled: Library, file: Path
) -> None:
    with pytest.raises(LoraryError, match=match):
        called(name, filled, file, **fields)


def test_a_base_that_is_loaded_is_used_and_left_as_it_was(filled: Library, base: Base, file: Path) -> None:
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    given = called("evaluate", filled, file, base=base)
    filled_again = called("evaluate", filled, file)
    assert [cell.value for cell in given.cells] == [cell.value for cell in filled_again.cells]
    assert called("explain", filled, file, base=base).base_model == base.files.name
    with pytest.raises(LoraryError, match="a router must exist"):
        called("explain", filled, file, base=base, against="nobody")
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    lorary.attach(base.model, filled)
    lorary.detach(base.model)


@pytest.mark.parametrize("field", [{"dtype": "float64"}, {"device": "cpu"}])
def test_a_loaded_base_takes_no_options_of_loading(
    field: dict[str, str], filled: Library, base: Base, file: Path
) -> None:
    for name in ("evaluate", "explain"):
        with pytest.raises(UsageError, match="must be left out where the base model is loaded already"):
            called(name, filled, file, base=base, **field)


def test_tasks_come_as_reference_task_mapping_or_list(file: Path) -> None:
    by_name = load_tasks(file)
    a, z = by_name["a"], by_name["z"]
    for tasks in (file, str(file), by_name, [file], list(by_name.values()), (a, z, by_name["q"])):
        assert tasks_of(tasks) == by_name
    assert tasks_of(a) == {"a": a}
    assert tasks_of([a, z], ["z"]) == {"z": z}
    with pytest.raises(UsageError, match=r"the tasks given: the tasks named must be among its 2 tasks"):
        tasks_of([a, z], ["y"])
    with pytest.raises(TaskError, match="task 'a' must be given once"):
        tasks_of([a, file])
    for wrong in (3, [3], None, [None, a]):
        with pytest.raises(UsageError, match="tasks must be a reference"):
            tasks_of(wrong)


def test_tasks_without_test_rows_are_refused(filled: Library, file: Path) -> None:
    task: Task = load_tasks(file)["q"]
    with pytest.raises(TaskError, match="must have tasks with test rows"):
        lorary.evaluate(filled, task)


def test_wrong_kinds_are_named(filled: Library) -> None:
    with pytest.raises(UsageError, match=r"must be a lorary\.Library or the path .*\nfound: a int"):
        library_of(3)
    with pytest.raises(LibraryError):
        library_of("nowhere")
    with pytest.raises(UsageError, match=r"must be a lorary\.Base or a reference .*\nfound: a Tensor"):
        base_at_hand(filled, torch.ones(1), BaseOptions())


def test_prompts_come_as_text_prompts_or_file(filled: Library, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a 1:", "answer": "up"}\n', encoding="utf-8")
    ways: list[tuple[Any, dict[str, str]]] = [
        (path, {}), ("a 1:", {"answer": "up"}), (Prompt("a 1:", "up"), {}), ([Prompt("a 1:", "up")], {}),
    ]  # fmt: skip
    results = [lorary.explain(filled, prompts, most=0, **more) for prompts, more in ways]
    assert len({tuple(result.log_likelihood) for result in results}) == 1
    assert [len(lorary.explain(filled, ["a 1:", "b 2:"], most=0, max_new_tokens=1).prompts)] == [2]
    for prompts in (["a", "b"], Prompt("a", "b")):
        with pytest.raises(UsageError, match="an answer must be given with one prompt"):
            lorary.explain(filled, prompts, answer="up")


def test_a_merge_in_memory_is_that_of_the_command_and_can_join_a_library(filled: Library, tmp_path: Path) -> None:
    from lorary.formats.peft import read_adapter

    merged = lorary.merge(filled, method="mean", weights={"a": 0.5, "b": -1.0}, name="both")
    run_merge(str(filled.path), str(tmp_path / "both"), "mean", weights={"a": 0.5, "b": -1.0})
    written = read_adapter(tmp_path / "both")
    assert merged.name == "both"
    assert all(torch.equal(f.delta(), written.modules[path].delta()) for path, f in merged)
    filled.add_adapter(merged, {"tasks": []})
    assert "both" in filled.names()


def test_clusters_are_shown_with_their_members(filled: Library) -> None:
    result = lorary.cluster(filled, k=2)
    assert sorted(record["adapter"] for record in result.records()) == ["a", "b", "c", "d"]
    assert {record["cluster"] for record in result.records()} == {0, 1}
    lines = repr(result).splitlines()
    assert lines[0].startswith(f"{filled.path}: 2 clusters")
    assert {name for line in lines[2:] for name in line.split()[3:] if name} >= {"d"}


def test_an_adapter_is_shown_in_a_line_and_not_as_tensors(filled: Library) -> None:
    adapter = filled.get("a")
    assert repr(adapter) == f"Adapter('a', rank=3, layers=6, num_parameters={adapter.num_parameters})"
    factors = next(iter(adapter.modules.values()))
    assert repr(factors) == "LoraFactors(rank=3, d_in=48, d_out=32, scaling=2)"
    assert isinstance(adapter, Adapter)
    assert adapter.records()[0]["layer"] == "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("name", ["cluster", "evaluate", "merge"])
def test_a_room_that_has_the_name_of_a_function_stays_a_room(name: str) -> None:
    room = getattr(lorary, name)
    assert isinstance(room, types.ModuleType)
    assert room is importlib.import_module(f"lorary.{name}")
    assert callable(room)
    assert "Args:" in (inspect.getdoc(room) or "")
