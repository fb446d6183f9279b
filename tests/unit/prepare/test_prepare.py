"""Preparing routers from the experts' own data: what is stored, kept, made anew, and what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.data.yardstick import yardstick_prompts
from lorary.errors import RouterError, TaskError, UsageError
from lorary.evaluate.evaluate_library import evaluate_library
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.derived import iterate_derived
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base
from lorary.model.trace import trace
from lorary.prepare import phatgoose
from lorary.prepare.centroid import layer_centroids
from lorary.prepare.expert_rows import parse_mapping, rows_of_experts
from lorary.prepare.prepare_library import PrepareResult, prepare_library
from lorary.prepare.settings import PrepareSettings, routers_with_data

Make = Callable[..., Any]
SMALL: dict[str, Any] = {"rows": 4, "steps": 2}
SETTING: dict[str, Any] = {"norm": {"router": "norm", "calibrated": True}}


@pytest.fixture
def experts(
    library: Library, base: Base, random_adapter: Make, generator: torch.Generator, tasks: dict[str, Task]
) -> Library:
    """Three experts of one task each; 'two' has two."""
    for name, own in (("one", ["alpha"]), ("three", ["gamma"]), ("two", ["beta", "delta"])):
        adapter = random_adapter(base.model, name, generator, rank=2)
        told = {"tasks": own, "data_hashes": {task: tasks[task].data_hash for task in own}}
        library.add_adapter(adapter, told)
    return library


@pytest.fixture
def bare(base: Base) -> Iterator[Base]:
    """The base, bare again afterwards, whatever a test does."""
    yield base
    if hasattr(base.model, "_lorary"):
        detach(base.model)


def run(
    base: Base, library: Library, reference: str, router: str, names: list[str] | None = None, **changes: Any
) -> PrepareResult:
    settings = PrepareSettings(router, **{**SMALL, **changes})
    data = rows_of_experts(library, names or library.names(), reference, {}, settings.num_rows, settings.seed)
    return prepare_library(base, library, data, settings)


def stored(library: Library, kind: str) -> dict[str, bytes]:
    """The tensors' bytes by expert, or of all together."""
    entries = iterate_derived(library.path, kind)
    return {str(entry.key.get("expert", "all")): entry.files["prepared.safetensors"] for entry in entries}


@torch.no_grad()
def weights(model: Any) -> Tensor:
    with trace(model) as traced:
        model(input_ids=torch.arange(1, 9)[None])
    return traced.stacked()


@pytest.mark.parametrize("router", routers_with_data())
def test_a_prepared_router_can_be_used_and_an_unprepared_one_says_what_to_do(
    bare: Base, experts: Library, reference: str, router: str
) -> None:
    attach(bare.model, experts)
    if router not in ("auto", "contrast"):  # shipped prompts stand in (tests/unit/model/test_yardstick.py)
        with pytest.raises(RouterError, match=rf"nothing for expert 'one' at .*\n.*prepare .* --router {router}"):
            routing(bare.model, SETTING.get(router, router)).__enter__()
    detach(bare.model)
    result = run(bare, experts, reference, router)
    assert (result.prepared, result.kept) == (["one", "three", "two"], [])
    attach(bare.model, experts)
    with routing(bare.model, SETTING.get(router, router)):
        found = weights(bare.model)
    assert torch.allclose(found.sum(dim=-1), torch.ones(found.shape[:-1]))
    assert (found > 0).any(dim=-1).all()
    detach(bare.model)
    before = stored(experts, result.kind)
    assert run(bare, experts, reference, router).kept == ["one", "three", "two"]
    assert stored(experts, result.kind) == before
    other = "centroid" if router != "centroid" else "phatgoose"
    with pytest.raises(RouterError, match="nothing for expert"):  # prepared for one, useless for another
        attach(bare.model, experts, router=other)


def test_the_stored_centroid_is_that_of_the_rows_drawn(bare: Base, experts: Library, reference: str) -> None:
    from safetensors.torch import load

    run(bare, experts, reference, "centroid", rows=3, seed=5)
    rows = rows_of_experts(experts, ["two"], reference, {}, 3, 5)["two"].rows
    assert [row.task for row in rows] == ["beta"] * 3 + ["delta"] * 3
    assert {row.split for row in rows} == {"train"}
    template = make_template("plain", bare.tokenizer, max_length=256)
    expected = layer_centroids(bare.model, experts.get("two"), [template.encode(r.source, r.target) for r in rows])
    found = load(stored(experts, "centroid")["two"])
    assert all(torch.equal(found[path], expected[path]) for path in expected)


def test_only_what_changed_is_made_anew(
    bare: Base, experts: Library, reference: str, random_adapter: Make, generator: torch.Generator
) -> None:
    for router in ("centroid", "task-predictor"):
        run(bare, experts, reference, router)
    provenance = {key: experts.provenance("two")[key] for key in ("tasks", "data_hashes")}
    experts.replace_adapter(random_adapter(bare.model, "two", generator, rank=2), provenance)
    for router in ("centroid", "task-predictor"):
        kind = router.replace("-", "_")
        with pytest.raises(
            RouterError, match=rf"'{kind}.* must be prepared.*\nfound: .* as it is now: it, or its company"
        ):
            attach(bare.model, experts, router=router)
        assert run(bare, experts, reference, router).prepared == ["two"]
        detach(attach(bare.model, experts, router=router))
    assert run(bare, experts, reference, "centroid", seed=1).prepared == ["one", "three", "two"]
    assert run(bare, experts, reference, "centroid", ["one"], rows=2, seed=1).prepared == ["one"]


def test_a_kill_between_experts_loses_none_that_was_finished(
    bare: Base, experts: Library, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(bare, experts, reference, "phatgoose")
    whole = stored(experts, "phatgoose")
    real, calls = phatgoose.train_gates, []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(phatgoose, "train_gates", killed)
    with pytest.raises(KeyboardInterrupt):
        run(bare, experts, reference, "phatgoose", seed=3)
    first = stored(experts, "phatgoose")
    assert [name for name in whole if first[name] != whole[name]] == ["one"]
    resumed = run(bare, experts, reference, "phatgoose", seed=3)
    assert (resumed.prepared, resumed.kept) == (["three", "two"], ["one"])
    assert run(bare, experts, reference, "phatgoose").prepared == ["one", "three", "two"]
    assert stored(experts, "phatgoose") == whole  # a function of the seed and of nothing else
    assert not any("lorary" in name for name, _ in bare.model.named_modules())


def test_experts_without_known_tasks_and_other_data_are_refused_by_name(
    base: Base, experts: Library, reference: str, tmp_path: Path, random_adapter: Make, generator: torch.Generator
) -> None:
    def data(names: list[str], source: str = reference, **mapped: list[str]) -> Any:
        return rows_of_experts(experts, names, source, mapped, 4, 0)

    experts.add_adapter(random_adapter(base.model, "stray", generator), {"tasks": []})
    with pytest.raises(TaskError, match=r"tasks of expert 'stray' must be known.*\n.*\nremedy: --map stray=TASK"):
        data(["stray"])
    assert {row.task for row in data(["stray"], stray=["alpha", "gamma"])["stray"].rows} == {"alpha", "gamma"}
    experts.add_adapter(random_adapter(base.model, "gamma", generator), {"tasks": []})
    assert {row.task for row in data(["gamma", "one"])["gamma"].rows} == {"gamma"}  # its name is that of a task
    with pytest.raises(TaskError, match=r"tasks of expert 'one' must be in 'builtin'\nfound: .*alpha"):
        data(["one"], "builtin")
    with pytest.raises(UsageError, match="--map must name experts of the library\nfound: nobody"):
        data(["one"], nobody=["alpha"])
    other = tmp_path / "other.jsonl"
    lines = [{"task": "alpha", "split": split, "source": "x", "target": "y"} for split in ("train", "test")]
    lines.append({"task": "untrained", "split": "test", "source": "x", "target": "y"})
    other.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(TaskError, match=r"'alpha' of .* must be the data that expert 'one' was trained on"):
        data(["one"], str(other))
    assert len(data(["one"], str(other), one=["alpha"])["one"].rows) == 1
    with pytest.raises(TaskError, match="task 'untrained' of expert 'one' must have training rows"):
        data(["one"], str(other), one=["untrained"])


def test_a_mapping_is_names_and_tasks() -> None:
    assert parse_mapping(None) == {}
    assert parse_mapping("a=x, b=y,a=z") == {"a": ["x", "z"], "b": ["y"]}
    for text in ("", "a", "a=", "=x", "a=x,"):
        with pytest.raises(UsageError, match="--map must be NAME=TASK"):
            parse_mapping(text)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"router": "arrow"}, RouterError, "must be one that needs data\nfound: arrow"),
        ({"router": "centroid", "rows": 0}, UsageError, "--rows must be at least 1"),
        ({"router": "centroid", "features": "text"}, UsageError, "features are for routers"),
        ({"router": "phatgoose", "steps": 0}, UsageError, "--steps must be above 0"),
        ({"router": "phatgoose", "seed": -1}, UsageError, "--seed must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrepareSettings(**fields)


def test_a_predictor_must_know_all_experts(bare: Base, experts: Library, reference: str) -> None:
    with pytest.raises(RouterError, match="must know all experts of the library\nfound: nothing for expert 'three'"):
        run(bare, experts, reference, "task-predictor", ["one"])
    assert stored(experts, "samples_early") == {}
    run(bare, experts, reference, "task-predictor")
    assert run(bare, experts, reference, "task-predictor", ["one"], rows=2).prepared == ["one"]
    detach(attach(bare.model, experts, router="task-predictor"))


def test_contrast_is_made_of_all_experts_data_anew_and_keeps_none_of_it(
    bare: Base,
    experts: Library,
    reference: str,
    random_adapter: Make,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorary.model.yardstick.measured_prompts", lambda: yardstick_prompts(per_kind=1))
    with pytest.raises(RouterError, match="must know all experts of the library\nfound: nothing for expert 'three'"):
        run(bare, experts, reference, "contrast", ["one"])
    run(bare, experts, reference, "contrast")
    before = stored(experts, "contrast")
    kinds = {entry.name.rpartition("-")[0] for entry in (experts.path / "derived").iterdir()}
    assert kinds == {"contrast"}  # no prompts, in a library that may be handed on
    with pytest.raises(RouterError, match="found: nothing for expert 'three'"):  # nor is it known the second time
        run(bare, experts, reference, "contrast", ["one"])
    assert run(bare, experts, reference, "contrast", seed=2).prepared == ["one", "three", "two"]
    assert stored(experts, "contrast") != before
    provenance = {key: experts.provenance("two")[key] for key in ("tasks", "data_hashes")}
    experts.replace_adapter(random_adapter(bare.model, "two", generator, rank=2), provenance)
    with pytest.warns(UserWarning, match=r"'contrast' holds was prepared for other experts.*--router contrast --tasks"):
        detach(attach(bare.model, experts, router="contrast"))
    assert run(bare, experts, reference, "contrast", seed=2).prepared == ["one", "three", "two"]
    detach(attach(bare.model, experts, router="contrast"))
    assert PrepareSettings("contrast").num_rows == 16
    assert PrepareSettings("centroid").num_rows == 100


def test_an_evaluation_scores_anew_what_was_prepared_anew(
    bare: Base, experts: Library, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "test.jsonl"
    row = {"task": "alpha", "split": "test", "source": "alpha test 1:", "target": "up"}
    path.write_text(json.dumps(row))
    scored: list[str] = []
    from lorary.evaluate import scorer as module

    real = module.score_rows
    monkeypatch.setattr(module, "score_rows", lambda *args, **more: scored.append("x") or real(*args, **more))  # type: ignore[func-returns-value]

    def evaluate() -> int:
        scored.clear()
        settings = EvaluateSettings(routers=("centroid",), rows=1)
        evaluate_library(bare, experts, load_tasks(str(path)), settings)
        return len(scored)

    run(bare, experts, reference, "centroid")
    assert evaluate() == 2  # the base and the router
    assert evaluate() == 0
    run(bare, experts, reference, "centroid", seed=8)
    assert evaluate() == 1
