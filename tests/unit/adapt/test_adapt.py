"""Adapting a small library to new tasks: every method, what is kept, what is refused, and that files say the truth."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapt import lorahub as adapt_lorahub
from lorary.adapt.adapt_library import adapt_library
from lorary.adapt.context import AdaptContext
from lorary.adapt.pool import pool_of
from lorary.adapt.settings import METHODS, AdaptSettings
from lorary.build.build_library import build_library
from lorary.build.settings import BuildSettings, RunSettings
from lorary.data.schema import Task
from lorary.data.template import make_template
from lorary.display import Display
from lorary.errors import AdapterError, LibraryError, UsageError
from lorary.evaluate.loglik import answer_losses
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.recipes.adapt import run_adapt
from lorary.train.callbacks import JsonlCallback

TRAIN = BuildSettings(
    steps=3,
    rank=2,
    target_modules=("q_proj", "down_proj"),
    upper_layers=1,
    batch_size=2,
    evals=1,
    learning_rate=0.02,
    val_rows=2,
    train_rows=4,
)
NEW = ("beta", "gamma")
# Settings of each method that try it with little work, but whole.
QUICK: dict[str, dict[str, Any]] = {
    "lora": {},
    "joint": {"start": "alpha"},
    "mu": {},
    "nearest": {"sk": 2},
    "poly": {},
    "poly-z": {},
    "cat": {},
    "lorahub": {"budget": 10},
}

SEARCHES = pytest.mark.skipif(find_spec("cma") is None, reason="the extra lorahub is not installed")
# All methods, or some of them, but for a search that is not there.
METHOD = [pytest.param(method, marks=[SEARCHES] if method == "lorahub" else []) for method in METHODS]
MIXTURE = [method for method in METHOD if method.values[0] in ("poly", "poly-z", "cat", "lorahub")]


def settings_of(method: str, **changes: Any) -> AdaptSettings:
    return AdaptSettings(method, **{"train": TRAIN, **QUICK[method], **changes})


@pytest.fixture(scope="module")
def source(base: Base, tasks: Mapping[str, Task], tmp_path_factory: Any, tiny_base_folder: Path) -> Library:
    """A library of two experts, of the tasks alpha and delta; only read."""
    library = Library.create(tmp_path_factory.mktemp("source") / "lib", str(tiny_base_folder))
    trained = {name: tasks[name] for name in ("alpha", "delta")}
    build_library(base, library, trained, replace(TRAIN, steps=12, learning_rate=0.05))
    return library


@pytest.fixture
def new(tasks: Mapping[str, Task]) -> dict[str, Task]:
    return {name: tasks[name] for name in NEW}


def loss_in_peft(folder: Path, adapter: Path, base: Base, task: Task) -> float:
    """Loss of an adapter through PEFT alone, on the validation rows that training looks at."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(str(folder)).model, str(adapter)).eval()
    template = make_template("plain", base.tokenizer, max_length=256)
    losses = answer_losses(model, [template.encode(row.source, row.target) for row in task.split("val")[:2]])
    return sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)


@pytest.mark.parametrize("method", METHOD)
def test_what_was_validated_is_what_peft_computes(
    method: str, base: Base, source: Library, library: Library, new: dict[str, Task], tiny_base_folder: Path
) -> None:
    result = adapt_library(base, source, new, settings_of(method), into=library)
    assert result.names == {name: f"{name}-{method}" for name in NEW}
    assert (result.adapted, result.kept) == (list(NEW), [])
    assert library.verify() == []
    for task, name in result.names.items():
        bare, start, adapted = result.val_losses[task]
        assert adapted <= start + 1e-9
        if method in ("lora", "lorahub", "poly", "poly-z"):
            assert start == pytest.approx(bare, abs=1e-4)
        found = loss_in_peft(tiny_base_folder, library.path / "adapters" / name, base, new[task])
        assert found == pytest.approx(adapted, abs=1e-5)
        known = library.provenance(name)
        assert known["method"] == f"adapt-{method}"
        assert known["data_hashes"] == {task: new[task].data_hash}
        parents = {one: source.provenance(one)["content_hash"] for one in known["parent_names"]}
        assert known["parents"] == list(parents.values())
        assert (method == "lora") == (parents == {})
    again = adapt_library(base, source, new, settings_of(method), into=library)
    assert (again.adapted, again.kept, again.val_losses) == ([], list(NEW), result.val_losses)
    assert not list((library.path / ".build").iterdir())


@SEARCHES
def test_a_task_may_be_named_as_a_file_of_ours(
    base: Base, source: Library, library: Library, tasks: Mapping[str, Task]
) -> None:
    # With fewer adapters than there are, losses are kept beside the search of the task.
    named = {name: replace(tasks["beta"], name=name) for name in ("losses", "retrieved")}
    result = adapt_library(base, source, named, settings_of("lorahub", sk=1), into=library)
    assert result.adapted == list(named)


@pytest.mark.parametrize("method", MIXTURE)
def test_mixtures_get_better_with_more_work(
    method: str, base: Base, source: Library, library: Library, new: dict[str, Task]
) -> None:
    changes: dict[str, Any] = {"budget": 30} if method == "lorahub" else {"train": replace(TRAIN, steps=12, evals=3)}
    result = adapt_library(base, source, {"beta": new["beta"]}, settings_of(method, **changes), into=library)
    _, start, adapted = result.val_losses["beta"]
    assert adapted < start - 0.05
    weights = library.provenance("beta-" + method)["mean_weights"]
    assert set(weights) == {"alpha", "delta"}
    assert all(math.isfinite(weight) for weight in weights.values())


def test_the_start_of_zero_shot_is_the_mean_itself(
    base: Base, source: Library, library: Library, new: dict[str, Task]
) -> None:
    adapt_library(base, source, new, settings_of("mu", zero_shot=True), into=library)
    made, (one, other) = library.get("beta-mu"), (source.get(name) for name in source)
    for path, factors in made:
        assert torch.allclose(factors.lora_a, (one.modules[path].lora_a + other.modules[path].lora_a) / 2)
        assert torch.allclose(factors.lora_b, (one.modules[path].lora_b + other.modules[path].lora_b) / 2)


def test_a_joint_expert_taken_as_it_is_is_that_expert(
    base: Base, source: Library, library: Library, new: dict[str, Task]
) -> None:
    adapt_library(base, source, new, settings_of("joint", zero_shot=True), into=library)
    assert set(library.get("beta-joint").modules) == set(source.get("alpha").modules)
    for path, factors in library.get("beta-joint"):
        assert torch.equal(factors.delta(), source.get("alpha").modules[path].delta())


def with_another_rank(source: Library, base: Base, folder: Path, random_adapter: Callable[..., Any]) -> Library:
    """A library of three experts of ranks 2, 2 and 3, the last of which adapts other layers."""
    library = Library.create(folder, base.model, base_name=source.base.name)
    for name in source:
        library.add(source.path / "adapters" / name)
    generator = torch.Generator().manual_seed(1)
    targets = ("q_proj", "v_proj", "down_proj")
    library.add_adapter(
        random_adapter(base.model, "imported", generator, size=0.3, targets=targets), {"tasks": ["elsewhere"]}
    )
    return library


def test_adapters_of_unequal_ranks_are_averaged_by_their_updates(
    base: Base, source: Library, library: Library, new: dict[str, Task], random_adapter: Any, tmp_path: Path
) -> None:
    mixed = with_another_rank(source, base, tmp_path / "mixed", random_adapter)
    beta = {"beta": new["beta"]}
    exact = adapt_library(base, mixed, beta, settings_of("mu", zero_shot=True, rank=7), into=library)
    assert exact.errors["beta"] == pytest.approx(0.0, abs=1e-6)
    adapters = [mixed.get(name) for name in mixed]
    for path, factors in library.get("beta-mu"):
        deltas = [adapter.modules[path].delta() for adapter in adapters if path in adapter.modules]
        assert torch.allclose(factors.delta(), sum(deltas[1:], deltas[0]) / 3, atol=1e-6)
    cut = adapt_library(base, mixed, beta, settings_of("mu", zero_shot=True, rank=1, name="cut"), into=library)
    assert 0.1 < cut.errors["beta"] < 1
    assert library.get("cut").rank == 1
    with pytest.raises(AdapterError, match=r"factors of layer '.*_proj' must be of one rank"):
        adapt_library(base, mixed, beta, settings_of("poly-z"), into=library)


@pytest.mark.parametrize("method", MIXTURE[2:])
def test_a_mixture_brought_to_a_rank_is_measured_anew(
    method: str, base: Base, source: Library, library: Library, new: dict[str, Task], tiny_base_folder: Path,
    random_adapter: Any, tmp_path: Path,
) -> None:  # fmt: skip
    mixed = with_another_rank(source, base, tmp_path / "mixed", random_adapter)
    beta = {"beta": new["beta"]}
    result = adapt_library(base, mixed, beta, settings_of(method, rank=2), into=library)
    name = result.names["beta"]
    assert library.get(name).rank == 2
    assert result.errors["beta"] > 0
    found = loss_in_peft(tiny_base_folder, library.path / "adapters" / name, base, new["beta"])
    assert found == pytest.approx(result.val_losses["beta"][2], abs=1e-5)
    whole = adapt_library(base, mixed, beta, settings_of(method, name="whole"), into=library)
    assert library.get("whole").rank == 7
    found = loss_in_peft(tiny_base_folder, library.path / "adapters" / "whole", base, new["beta"])
    assert found == pytest.approx(whole.val_losses["beta"][2], abs=1e-5)


@pytest.mark.parametrize("retrieve", ["loss", "delta"])
def test_the_nearest_adapter_is_that_of_a_task_with_the_same_answers(
    retrieve: str, base: Base, source: Library, library: Library, tasks: Mapping[str, Task]
) -> None:
    train = replace(TRAIN, steps=12, learning_rate=0.05)
    settings = AdaptSettings("nearest", train, retrieve=retrieve, zero_shot=True)
    pair = {name: tasks[name] for name in ("beta", "gamma")}
    result = adapt_library(base, source, pair, settings, into=library)
    # alpha and gamma answer down, beta and delta up.
    assert result.parents == {"beta": ["delta"], "gamma": ["alpha"]}


def test_an_adapter_of_the_task_itself_is_where_poly_begins(
    base: Base, source: Library, library: Library, tasks: Mapping[str, Task]
) -> None:
    result = adapt_library(base, source, {"alpha": tasks["alpha"]}, settings_of("poly-z"), into=library)
    own = source.provenance("alpha")["metrics"]["val_loss"]
    assert result.val_losses["alpha"][1] == pytest.approx(own, rel=1e-5)


def test_results_lie_beside_their_parents_and_are_none_of_the_next_ones(
    base: Base, source: Library, new: dict[str, Task], tmp_path: Path
) -> None:
    both = Library.create(tmp_path / "both", base.model, base_name=source.base.name)
    for name in source:
        both.add(source.path / "adapters" / name)
    adapt_library(base, both, {"beta": new["beta"]}, settings_of("mu"))
    adapt_library(base, both, {"gamma": new["gamma"]}, settings_of("mu"))
    assert both.provenance("gamma-mu")["parent_names"] == ["alpha", "delta"]
    named = settings_of("mu", experts=("beta-mu", "alpha"), name="named")
    adapt_library(base, both, {"gamma": new["gamma"]}, named)
    assert both.provenance("named")["parent_names"] == ["alpha", "beta-mu"]


def test_another_adaptation_of_the_same_name_is_refused(
    base: Base, source: Library, library: Library, new: dict[str, Task]
) -> None:
    adapt_library(base, source, new, settings_of("nearest"), into=library)
    with pytest.raises(LibraryError, match=r"'beta-nearest' free.*\nfound: other sk: 2 instead of 1"):
        adapt_library(base, source, new, settings_of("nearest", sk=1), into=library)
    other = settings_of("nearest", train=replace(TRAIN, seed=1))
    with pytest.raises(LibraryError, match="seed 0 instead of 1"):
        adapt_library(base, source, new, other, into=library)
    with pytest.raises(LibraryError, match=r"'alpha' free.*\nfound: no result of lorary adapt"):
        adapt_library(base, source, {"beta": new["beta"]}, settings_of("lora", name="alpha"))


class Died(BaseException):
    """Nothing catches it, as if the process were gone."""


def weights(library: Library) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in library.path.glob("adapters/*/*.safetensors")}


@pytest.mark.parametrize("method", ["joint", "cat"])
def test_a_killed_training_goes_on_to_the_same_bits(
    method: str, base: Base, source: Library, library: Library, new: dict[str, Task], tmp_path: Path,
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole = Library.create(tmp_path / "whole", str(tiny_base_folder))
    adapt_library(base, source, new, settings_of(method), into=whole)
    left = [2]

    def dies(self: Any, steps: Any, *_args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(JsonlCallback, "on_step", dies)
        with pytest.raises(Died):
            adapt_library(base, source, new, settings_of(method), into=library)
    assert weights(library) == {}
    adapt_library(base, source, new, settings_of(method), into=library)
    assert weights(library) == weights(whole)


@pytest.mark.parametrize("method", ["poly", "cat"])
def test_cut_mixtures_that_were_finished_before_a_kill_are_kept(
    method: str, base: Base, source: Library, library: Library, new: dict[str, Task], tmp_path: Path,
    tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, settings = Library.create(tmp_path / "whole", str(tiny_base_folder)), settings_of(method, rank=1)
    adapt_library(base, source, new, settings, into=whole)
    left = [TRAIN.steps + 2]

    def dies(self: Any, steps: Any, *_args: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(JsonlCallback, "on_step", dies)
        with pytest.raises(Died):
            adapt_library(base, source, new, settings, into=library)
    assert library.names() == [f"beta-{method}"]
    adapt_library(base, source, new, settings, into=library)
    assert weights(library) == weights(whole)


@SEARCHES
def test_a_cut_that_is_worse_than_the_base_gives_way_to_nothing(
    base: Base, source: Library, library: Library, new: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.adapt.mixture.adapter_losses", lambda context, cut, val: dict.fromkeys(cut, 99.0))
    beta = {"beta": new["beta"]}
    result = adapt_library(base, source, beta, settings_of("lorahub", rank=1), into=library)
    base_loss, _, loss = result.val_losses["beta"]
    assert loss == base_loss
    assert library.provenance("beta-lorahub")["metrics"]["val_loss_cut"] == 99.0
    assert all(not own.lora_b.any() for own in library.get("beta-lorahub").modules.values())


def test_running_state_is_not_taken_up_where_names_have_changed_hands(
    base: Base, source: Library, library: Library, new: dict[str, Task]
) -> None:
    pool = pool_of(source, settings_of("cat"))
    swapped = replace(pool, hashes=dict(zip(pool.hashes, reversed(pool.hashes.values()), strict=True)))
    keys = {
        AdaptContext(base, library, new, settings_of("cat"), RunSettings(), Display(), own).key
        for own in (pool, swapped)
    }
    assert len(keys) == 2


def test_results_that_differ_in_case_alone_are_refused_before_anything_is_trained(
    base: Base, source: Library, library: Library, new: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.adapt.adapt_library.open_shards", lambda *_: pytest.fail("it was begun"))
    both = {"beta": new["beta"], "Beta": new["beta"]}
    with pytest.raises(LibraryError, match="must differ in more than case\nfound: 'Beta-lora' and 'beta-lora'"):
        adapt_library(base, source, both, settings_of("lora"), into=library)


@SEARCHES
def test_a_search_that_is_interrupted_in_a_new_library_is_kept(
    source: Library, new: dict[str, Task], reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = adapt_lorahub._Mixtures.losses, []

    def losses(self: Any, candidates: Any, rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, candidates, rows)

    monkeypatch.setattr(adapt_lorahub._Mixtures, "losses", losses)
    settings = settings_of("lorahub", budget=18)
    arguments: dict[str, Any] = {"names": ["beta"], "into": str(tmp_path / "new")}
    with pytest.raises(KeyboardInterrupt):
        run_adapt(str(source.path), reference, settings, **arguments)
    assert list((tmp_path / "new" / ".build").glob("*-search-*.json"))
    before = len(calls)
    run_adapt(str(source.path), reference, settings, **arguments)
    again = len(calls) - before
    calls[:] = [1] * 10
    run_adapt(str(source.path), reference, settings, **{**arguments, "into": str(tmp_path / "other")})
    assert again < len(calls) - 10


@SEARCHES
def test_a_killed_search_tries_nothing_twice(
    base: Base, source: Library, library: Library, new: dict[str, Task], tmp_path: Path, tiny_base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = settings_of("lorahub", budget=18)
    whole = Library.create(tmp_path / "whole", str(tiny_base_folder))
    adapt_library(base, source, new, settings, into=whole)
    original, tried = adapt_lorahub._Mixtures.losses, []

    def losses(self: Any, candidates: Any, rows: Any) -> Any:
        if len(candidates) > 1:
            tried.append(candidates)
        if len(tried) == 3:
            tried.pop()
            raise Died
        return original(self, candidates, rows)

    beta = {"beta": new["beta"]}
    with monkeypatch.context() as patch:
        patch.setattr(adapt_lorahub._Mixtures, "losses", losses)
        with pytest.raises(Died):
            adapt_library(base, source, beta, settings, into=library)
        patch.setattr(adapt_lorahub._Mixtures, "losses", lambda *args: tried.append(args[1]) or original(*args))
        adapt_library(base, source, beta, settings, into=library)
    assert len([candidates for candidates in tried if len(candidates) > 1]) == 3
    assert weights(library) == {"beta-lorahub": weights(whole)["beta-lorahub"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora", "sk": 3}, "--sk needs --method nearest or poly"),
        ({"method": "poly", "zero_shot": True}, "--steps 0 needs --method joint or mu or nearest"),
        ({"method": "mu", "mix": "sums"}, "--mix must be one of factors, outputs"),
        ({"method": "cat", "retrieve": "random"}, "--retrieve and --retrieve-rows need --sk"),
        ({"method": "lorahub", "budget": 0}, "--budget must be above 0"),
        ({"method": "soup"}, "--method must be one of lora, joint"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdaptSettings(**changes)


def test_what_is_missing_is_named(base: Base, source: Library, library: Library, new: dict[str, Task]) -> None:
    with pytest.raises(
        LibraryError, match=r"no adapter 'joint'\nremedy: name others with --start: it has alpha, delta"
    ):
        adapt_library(base, source, new, AdaptSettings("joint", TRAIN), into=library)
    with pytest.raises(LibraryError, match="must hold adapters"):
        adapt_library(base, library, new, settings_of("mu"))
    with pytest.raises(UsageError, match="--name names the adapter of one task"):
        adapt_library(base, source, new, settings_of("mu", name="one"), into=library)


def test_a_command_makes_the_library_it_is_told_to_put_results_into(
    source: Library, reference: str, tmp_path: Path
) -> None:
    into = tmp_path / "into"
    result = run_adapt(str(source.path), reference, settings_of("mu"), names=["gamma"], into=str(into))
    assert result.library == str(into)
    assert Library.open(into).names() == ["gamma-mu"]
    assert json.loads(json.dumps(result.errors)) == {"gamma": 0.0}
