"""Experts that come and go while the model is routed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.adapters import write_adapter
from torch import Tensor

from lorary.adapter import Adapter
from lorary.errors import AdapterError, RouterError, UsageError
from lorary.model.attach import detach, routing
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.prepare import prepare
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]
IDS = torch.arange(1, 13).view(2, 6)
SETTINGS: list[Any] = ["arrow", "uniform", "norm", "lag", {"router": "projection", "per": "request"}]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    """Four experts of unequal ranks; 'b' adapts the second layer only, 'c' a layer that no other does."""
    special: dict[str, dict[str, Any]] = {"b": {"layers": [1]}, "c": {"targets": ("q_proj", "up_proj")}}
    return [
        random_adapter(tiny_model(), name, generator, rank=1 + i, **special.get(name, {}))
        for i, name in enumerate("abcd")
    ]


def assert_equal(model: Any, fresh: Any) -> None:
    """As one that was built anew, up to the rounding of sums in another order, under every setting."""
    state, other = seating(model), seating(fresh)
    assert state.experts == other.experts
    assert list(state.layers) == list(other.layers)
    for setting in SETTINGS:
        with routing(model, setting), routing(fresh, setting), trace(model) as one, trace(fresh) as two:
            assert (logits(model) - logits(fresh)).abs().max() < 1e-4
            if one.layers:
                assert torch.allclose(one.stacked(), two.stacked(), atol=1e-5)


@pytest.mark.parametrize("late", ["d", "a", "b", "c"])
def test_an_expert_that_comes_late_is_as_if_it_had_always_been_there(
    tiny_model: Make, adapters: list[Adapter], route: Make, late: str
) -> None:
    model = route(tiny_model(), [a for a in adapters if a.name != late], top_k=2)
    (adapter,) = (a for a in adapters if a.name == late)
    assert add_expert(model, adapter) == late
    assert_equal(model, route(tiny_model(), adapters, top_k=2))


@pytest.mark.parametrize("gone", ["a", "b", "c", "d"])
def test_an_expert_that_went_leaves_nothing_behind(
    tiny_model: Make, adapters: list[Adapter], route: Make, gone: str
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    remove_expert(model, gone)
    fresh = route(tiny_model(), [a for a in adapters if a.name != gone], top_k=2)
    assert_equal(model, fresh)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
    # Seats are still in the order of names, so that even the bits agree.
    assert torch.equal(logits(model), logits(fresh))


@pytest.mark.parametrize("same_shape", [True, False])
def test_a_replaced_expert_is_the_new_one(
    tiny_model: Make, adapters: list[Adapter], route: Make, random_adapter: Make, generator: torch.Generator,
    same_shape: bool,
) -> None:  # fmt: skip
    model = route(tiny_model(), adapters, top_k=2)
    rank, layers = (2, [1]) if same_shape else (4, None)
    new = random_adapter(tiny_model(), "b", generator, rank=rank, layers=layers)
    assert replace_expert(model, new) == "b"
    fresh = route(tiny_model(), [new if a.name == "b" else a for a in adapters], top_k=2)
    assert_equal(model, fresh)
    assert torch.equal(logits(model), logits(fresh)) == same_shape
    assert seating(model).seats == (("a", "b", "c", "d") if same_shape else ("a", "c", "d", "b"))


def test_the_only_expert_can_be_replaced(tiny_model: Make, adapters: list[Adapter], route: Make) -> None:
    model = route(tiny_model(), adapters[:1])
    replace_expert(model, adapters[2], name="a")
    renamed = Adapter("a", adapters[2].modules, adapters[2].config)
    assert_equal(model, route(tiny_model(), [renamed]))


def test_many_changes_end_where_a_fresh_model_begins(
    tiny_model: Make, adapters: list[Adapter], route: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    kept = {adapter.name: adapter for adapter in adapters}
    for number in range(12):
        name = f"n{(7 * number) % 12:02}"
        kept[name] = random_adapter(tiny_model(), name, generator, rank=1 + number % 5)
        add_expert(model, kept[name])
        if number % 3 == 2:
            gone = sorted(kept)[number % len(kept)]
            remove_expert(model, gone)
            del kept[gone]
    assert_equal(model, route(tiny_model(), list(kept.values()), top_k=2))


def test_an_expert_comes_from_a_folder_under_any_name(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Path
) -> None:
    model = route(tiny_model(), adapters[:1])
    write_adapter(adapters[3], tmp_path / "d")
    assert add_expert(model, tmp_path / "d") == "d"
    assert add_expert(model, str(tmp_path / "d"), "again") == "again"
    assert seating(model).experts == ("a", "again", "d")


def test_the_work_for_one_expert_does_not_grow_with_the_library(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.model import layers

    factorised: list[int] = []
    real = layers.expert_facts

    def counting(lora_a: Tensor, lora_b: Tensor) -> Any:
        factorised.append(len(lora_a))
        return real(lora_a, lora_b)

    model = route(tiny_model(), [random_adapter(tiny_model(), f"e{i}", generator) for i in range(9)])
    monkeypatch.setattr(layers, "expert_facts", counting)
    add_expert(model, random_adapter(tiny_model(), "late", generator))
    assert factorised == [1] * 6
    first = next(iter(seating(model).layers.values())).lora
    for name in ("later", "last"):  # the first one made room for both
        place = first.up.data_ptr()
        add_expert(model, random_adapter(tiny_model(), name, generator))
        assert first.up.data_ptr() == place


def test_what_cannot_come_or_go_is_refused_and_changes_nothing(
    tiny_model: Make, adapters: list[Adapter], route: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    model = route(tiny_model(), adapters[:2], top_k=2)
    before = logits(model)
    misfit = random_adapter(tiny_model(hidden_size=64, num_attention_heads=4), "misfit", generator)
    with pytest.raises(AdapterError, match="'misfit' must fit layer"):
        add_expert(model, misfit)
    with pytest.raises(RouterError, match=r"a name of its own\nfound: 'a' is seated\nremedy: lorary.replace_expert"):
        add_expert(model, adapters[0])
    with pytest.raises(UsageError, match="the name of an adapter"):
        add_expert(model, adapters[2], "../c")
    for change in (lambda: remove_expert(model, "z"), lambda: replace_expert(model, adapters[2])):
        with pytest.raises(RouterError, match="the expert must be seated"):
            change()
    with routing(model, "arrow"), pytest.raises(UsageError, match="outside of `with"):
        remove_expert(model, "a")
    with trace(model), pytest.raises(UsageError, match="outside of `with"):
        add_expert(model, adapters[2])
    assert torch.equal(logits(model), before)
    assert seating(model).experts == ("a", "b")
    remove_expert(model, "b")
    with pytest.raises(UsageError, match=r"must keep an expert\nfound: 'a' is the last one\nremedy: lorary.detach"):
        remove_expert(model, "a")


def test_what_the_router_in_force_needs_must_stay(
    tiny_model: Make, adapters: list[Adapter], route: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    for setting in ({"experts": ["a"]}, {"allow": ["a", "d"]}):
        model = route(tiny_model(), adapters, **setting)
        with pytest.raises(RouterError, match=r"that the router in force names must stay\nfound: a"):
            remove_expert(model, "a")
        remove_expert(model, "b")
    at = "model.layers.1.mlp.up_proj"
    model = route(tiny_model(), adapters, per="token", at=at)
    with pytest.raises(RouterError, match=f"must keep an expert\nfound: 'c' is the only one at {at}"):
        remove_expert(model, "c")
    same_rank = [random_adapter(tiny_model(), name, generator, rank=2) for name in "ab"]
    model = route(tiny_model(), same_rank, mix="factors")
    with pytest.raises(RouterError, match="expert 'd' has rank 4"):
        add_expert(model, adapters[3])
    detach(model)


def test_an_expert_must_be_prepared_for_a_router_that_needs_it(
    tiny_model: Make, adapters: list[Adapter], route: Make
) -> None:
    model = route(tiny_model(), adapters[:1])
    known = {"a": {path: torch.tensor([0.0, 1.0]) for path in adapters[0].modules}}
    prepare(model, "norm_calibration", known)
    state = seating(model)
    from lorary.model.apply import apply_routing
    from lorary.route.setting import Routing

    apply_routing(model, state, Routing.of("norm", calibrated=True))
    with pytest.raises(RouterError, match="must be prepared before\nfound: nothing for 'd'"):
        add_expert(model, adapters[3])
    with pytest.raises(RouterError, match="cannot be replaced under a router that knows the old one"):
        replace_expert(model, adapters[3], "a")
    known["d"] = {path: torch.tensor([0.0, 1.0]) for path in adapters[3].modules}
    prepare(model, "norm_calibration", known)
    add_expert(model, adapters[3])
    remove_expert(model, "a")
    assert set(state.prepared["norm_calibration"]) == {"d"}


def test_a_copy_changes_alone(tiny_model: Make, adapters: list[Adapter], route: Make) -> None:
    model = route(tiny_model(), adapters[:2], top_k=2)
    add_expert(model, adapters[2])
    before = logits(model)
    other = copy.deepcopy(model)
    add_expert(other, adapters[3])
    remove_expert(other, "a")
    assert torch.equal(logits(model), before)
    assert_equal(other, route(tiny_model(), adapters[1:], top_k=2))


def test_experts_come_and_go_after_the_model_changed_its_dtype(
    tiny_model: Make, adapters: list[Adapter], route: Make
) -> None:
    model = route(tiny_model(), adapters[:2], top_k=2).to(torch.bfloat16)
    add_expert(model, adapters[3])
    remove_expert(model, "a")
    layer = next(iter(seating(model).layers.values()))
    assert layer.lora.down.dtype == torch.float32
    assert logits(model).isfinite().all()
    detach(model)
    assert not any("lorary" in name for name, _ in model.named_modules())
