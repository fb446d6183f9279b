"""Attaching and detaching: what is refused, what is left behind, and what a routed model survives."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unchecked import check_unchecked

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError, LibraryError, RouterError, UsageError
from lorary.formats.peft_config import new_config
from lorary.library.document import DEFAULT_ROUTER
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.layers import build_layers
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.route.setting import Routing

Make = Callable[..., Any]
IDS = torch.arange(1, 13).view(2, 6)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def traces_of_lorary(model: nn.Module) -> list[str]:
    """Everything that hangs on a model and is not its own: hooks, attributes, children, buffers."""
    left = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    left += [name for name, _ in model.named_modules() if "lorary" in name]
    left += [name for name in vars(model) if "lorary" in name]
    return left + [name for name, _ in model.named_buffers() if "lorary" in name]


@pytest.fixture
def model(tiny_model: Make) -> Any:
    return tiny_model()


@pytest.fixture
def adapters(model: Any, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    return [random_adapter(model, name, generator) for name in ("a", "b", "c")]


def test_detach_restores_the_model_exactly(model: Any, adapters: list[Adapter], route: Make) -> None:
    before, keys, bare = {k: v.clone() for k, v in model.state_dict().items()}, [*model.state_dict()], logits(model)
    assert route(model, adapters, top_k=2) is model
    assert [*model.state_dict()] == keys
    assert not torch.equal(logits(model), bare)
    assert traces_of_lorary(model)
    assert detach(model) is model
    assert traces_of_lorary(model) == []
    assert [*model.state_dict()] == keys
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), bare)
    with pytest.raises(UsageError, match="must be a routed one"):
        detach(model)


def test_a_model_holds_one_library_at_a_time(model: Any, adapters: list[Adapter], route: Make) -> None:
    route(model, adapters)
    before = logits(model)
    with pytest.raises(UsageError, match=r"one library at a time\nfound: experts are seated\nremedy: lorary.detach"):
        route(model, adapters[:1])
    assert torch.equal(logits(model), before)


def adapter_for(path: str, d_in: int, d_out: int) -> Adapter:
    factors = LoraFactors(torch.ones(2, d_in), torch.ones(d_out, 2), 1.0)
    return Adapter("misfit", {path: factors}, new_config(None, rank=2, alpha=2, target_modules=[path]))


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("model.layers.7.self_attn.q_proj", (32, 32), "'misfit' adapts layer 'model.layers.7.self_attn.q_proj'"),
        ("model.layers.1.self_attn.q_proj", (32, 31), "'misfit' must fit layer 'model.layers.1.self_attn.q_proj'"),
        ("model.layers.1.input_layernorm", (32, 32), "layer 'model.layers.1.input_layernorm' must be a linear layer"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    model: Any, adapters: list[Adapter], path: str, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        build_layers(model, [*adapters, adapter_for(path, *shape)])
    assert traces_of_lorary(model) == []


def test_attaching_that_fails_half_way_leaves_the_model_alone(
    model: Any, adapters: list[Adapter], route: Make, tiny_model: Make
) -> None:
    bare = logits(model)
    occupied = model.get_submodule("model.layers.1.mlp.down_proj")
    occupied.add_module("lorary", nn.Identity())
    with pytest.raises(AdapterError, match=r"layer 'model.layers.1.mlp.down_proj' must be free"):
        route(model, adapters)
    del occupied.lorary
    assert traces_of_lorary(model) == []
    with pytest.raises(RouterError, match="a named expert must be in the library"):
        route(model, adapters, experts=["z"])
    assert traces_of_lorary(model) == []
    assert torch.equal(logits(model), bare)
    route(model, adapters)


def test_one_module_under_two_paths_is_refused(tiny_model: Make, adapters: list[Adapter], route: Make) -> None:
    model = tiny_model()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(AdapterError, match="are one tied module"):
        route(model, adapters)
    assert traces_of_lorary(model) == []


def test_an_empty_library_is_refused(model: Any, route: Make) -> None:
    with pytest.raises(LibraryError, match="must hold an adapter to route over"):
        route(model, [])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"router": "arow"},
            RouterError,
            r"a router must exist\nfound: arow\nremedy: did you mean 'arrow'\? one of \['auto', 'arrow'",
        ),
        ({"mix": "deltas"}, RouterError, "mix must be one of"),
        ({"experts": "a"}, RouterError, "experts must be a list of different names"),
        ({"top_k": 0}, UsageError, "top_k must be at least 1"),
        ({"top_k": True}, UsageError, "top_k must be a whole number"),
        ({"experts": ["a", "a"]}, RouterError, "list of different names"),
        ({"experts": []}, RouterError, "list of different names"),
        ({"temperature": 0.0}, UsageError, "temperature must be a positive number"),
        ({"temperature": -1.0}, UsageError, "temperature must be a positive number"),
        ({"temperature": float("nan")}, UsageError, "temperature must be a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_unchecked(settings)


def test_factors_of_unequal_ranks_cannot_be_mixed(
    model: Any, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    adapters = [random_adapter(model, f"rank{rank}", generator, rank=rank) for rank in (2, 3)]
    with pytest.raises(
        RouterError, match=r"needs experts of one rank, at layer 'model.layers.0.*\nfound: ranks \[2, 3"
    ):
        route(model, adapters, mix="factors")
    assert traces_of_lorary(model) == []
    route(model, adapters)
    before = logits(model)
    with pytest.raises(RouterError, match="needs experts of one rank"), routing(model, {"mix": "factors"}):
        pass
    assert torch.equal(logits(model), before)


def test_routing_lasts_for_its_block_and_nests(model: Any, adapters: list[Adapter], route: Make) -> None:
    bare = logits(model)
    route(model, adapters, top_k=2)
    arrow = logits(model)
    with routing(model, "uniform"):
        uniform = logits(model)
        with routing(model, "base"):
            assert torch.equal(logits(model), bare)
        assert torch.equal(logits(model), uniform)
        with routing(model, {"experts": ["b"]}):
            only_b = logits(model)
            with routing(model, "arrow"):
                assert torch.equal(logits(model), arrow)
            assert torch.equal(logits(model), only_b)
    assert torch.equal(logits(model), arrow)
    assert not torch.equal(uniform, arrow)
    assert not torch.equal(only_b, uniform)


def test_routing_is_put_back_after_an_error(model: Any, adapters: list[Adapter], route: Make) -> None:
    route(model, adapters, top_k=2)
    arrow = logits(model)
    with pytest.raises(KeyError), routing(model, "uniform"):
        raise KeyError
    assert torch.equal(logits(model), arrow)
    for setting, error in (({"experts": ["z"]}, RouterError), ("none", RouterError), ({"topk": 2}, UsageError)):
        with pytest.raises(error), routing(model, setting):
            pass
        assert torch.equal(logits(model), arrow)


def test_an_unknown_field_of_a_setting_is_refused_by_name(model: Any, adapters: list[Adapter], route: Make) -> None:
    route(model, adapters)
    with pytest.raises(UsageError, match=r"found: \['topk'\]\nremedy: it has \['router', 'top_k'"):
        routing(model, {"topk": 2}).__enter__()


def test_experts_keep_their_dtype_when_the_model_changes_its_own(
    model: Any, adapters: list[Adapter], route: Make
) -> None:
    route(model, adapters, top_k=2)
    lora = next(iter(seating(model).layers.values())).lora
    down, up = lora.down.clone(), lora.up.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert lora.down.dtype == lora.up.dtype == torch.float32
    assert torch.equal(lora.down, down)
    assert torch.equal(lora.up, up)
    assert logits(model).isfinite().all()
    model.to(torch.float64)
    assert torch.equal(lora.down, down)
    assert logits(model).isfinite().all()


def test_experts_follow_the_model_to_its_device(model: Any, adapters: list[Adapter], route: Make) -> None:
    route(model, adapters, router="uniform")
    lora = next(iter(seating(model).layers.values())).lora
    model.to("meta")
    assert lora.fixed is not None
    assert {t.device.type for t in (lora.down, lora.up, lora.expert_of_rank, lora.fixed)} == {"meta"}


def test_a_copy_of_a_routed_model_routes_by_itself(model: Any, adapters: list[Adapter], route: Make) -> None:
    route(model, adapters, top_k=2)
    routed = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), routed)
    with routing(other, "base"):
        assert torch.equal(logits(model), routed)
        bare = logits(other)
    with trace(other) as traced:
        logits(model)
        assert traced.layers == []
        logits(other)
        assert len(traced.layers) == 6
    detach(other)
    assert traces_of_lorary(other) == []
    assert torch.equal(logits(other), bare)
    assert torch.equal(logits(model), routed)
    detach(model)
    assert torch.equal(logits(model), bare)


def test_experts_of_mixed_dtypes_are_stacked_without_loss(
    model: Any, random_adapter: Make, generator: torch.Generator
) -> None:
    adapter = random_adapter(model, "a", generator)
    halves = {p: LoraFactors(f.lora_a.half(), f.lora_b.half(), f.scaling) for p, f in adapter}
    brains = {p: LoraFactors(f.lora_a.bfloat16(), f.lora_b.bfloat16(), f.scaling) for p, f in adapter}
    layers = build_layers(
        model, [adapter, dataclasses.replace(adapter, modules=halves), dataclasses.replace(adapter, modules=brains)]
    )
    for path, layer in layers.items():
        rank = adapter.rank
        for i, modules in enumerate((adapter.modules, halves, brains)):
            assert torch.equal(layer.lora.down[i * rank : (i + 1) * rank], modules[path].lora_a.float())


def test_ambiguous_prototypes_are_named(
    model: Any, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    clear = random_adapter(model, "clear", generator)
    flat = random_adapter(model, "flat", generator, gap=1.0, layers=[1], targets=("q_proj",))
    with pytest.warns(UserWarning, match="1 prototypes are ambiguous.*expert 'flat' at model.layers.1"):
        route(model, [clear, flat])
    ((expert, layer, gap),) = seating(model).ambiguous()
    assert (expert, layer) == ("flat", "model.layers.1.self_attn.q_proj")
    assert gap > 0.999


def test_the_library_gives_the_settings_that_the_caller_leaves_out(
    model: Any, adapters: list[Adapter], tmp_path: Any
) -> None:
    from lorary.library.store import Library

    library = Library.create(tmp_path / "lib", model, base_name="tiny")
    library.add_adapter(adapters[0], {"tasks": ["a"]})
    library.set_default_router({"router": "uniform", "top_k": 3, "temperature": 0.5, "mix": "factors"})
    attach(model, str(tmp_path / "lib"), temperature=2.0)
    assert seating(model).routing == Routing.of("uniform", top_k=3, temperature=2.0, mix="factors")


def test_a_librarys_threshold_goes_with_its_router(model: Any, adapters: list[Adapter], route: Make) -> None:
    attached = route(model, adapters, top_k=1)
    library = seating(attached).library
    library.set_default_router({**DEFAULT_ROUTER, "top_k": 1, "threshold": 1e9, "null": 2e9})
    expected = logits(attached)
    with routing(attached, "norm"):
        by_norm = logits(attached)
    detach(attached)
    bare = logits(attached)
    attach(attached, library)
    assert torch.equal(logits(attached), bare)  # no score reaches the bound
    for setting in ("norm", ["norm"] * len(IDS), {"preset": "peft", "router": "norm", "top_k": 1}):
        with routing(attached, setting):
            assert torch.allclose(logits(attached), by_norm, atol=1e-6)
    detach(attached)
    attach(attached, library, router="norm")
    assert torch.allclose(logits(attached), by_norm, atol=1e-6)
    assert not torch.allclose(expected, bare)


def test_an_adapter_that_a_writer_takes_away_meanwhile_is_not_attached(
    model: Any, adapters: list[Adapter], route: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = detach_library(route(model, adapters))
    read, removed = Library.get, []

    def get(self: Library, name: str) -> Adapter:
        if name == "b" and not removed:
            removed.append(name)
            Library.open(library.path).remove("b")
        return read(self, name)

    monkeypatch.setattr(Library, "get", get)
    assert seating(attach(model, library)).experts == ("a", "c")
    detach(model)
    (library.path / "adapters" / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError):  # and one that is damaged is refused at once
        attach(model, library)


def detach_library(model: Any) -> Library:
    library = seating(model).library
    detach(model)
    return library
