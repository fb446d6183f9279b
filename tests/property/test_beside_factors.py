"""Experts that are more than a low-rank update: `lora_bias` and DoRA, mixed with plain ones under every plan.

The reference is the definition, from full matrices and plain loops (`tests.support.adapters.whole_update`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.support.adapters import as_dora, whole_update, with_biases
from torch import Tensor

import lorary
from lorary.adapter import Adapter
from lorary.errors import LibraryError, RouterError
from lorary.evaluate.references import drawn_anew
from lorary.lora.gated import GatedLora
from lorary.model.attach import detach, routing
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:router '.*' scores a DoRA by its low-rank part:UserWarning")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_base(tiny_model: Make, dtype: torch.dtype = torch.float64) -> Any:
    """A base whose layers have biases of their own, which DoRA leaves as they are."""
    model = tiny_model(dtype=dtype, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=seeded(len(name))))
    return model


def experts_of(make: Make, model: Any) -> list[Adapter]:
    """Plain ones, DoRAs and ones with biases, of unequal ranks and layers."""
    plain = [make(model, name, seeded(ord(name)), rank=1 + i) for i, name in enumerate("abcde")]
    partial = make(model, "f", seeded(6), layers=[0], targets=("q_proj", "up_proj"))
    return [
        plain[0],
        as_dora(plain[1], model, seeded(1)),
        with_biases(plain[2], seeded(2)),
        as_dora(plain[3], model, seeded(3)),
        plain[4],
        as_dora(partial, model, seeded(5)),
    ]


IDS = torch.randint(1, 300, (2, 9), generator=seeded(0))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    answer: Tensor = model(input_ids=ids, **inputs).logits
    return answer


def inputs_and_outputs(model: Any, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What each routed layer was given, and what it and its experts gave."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = args[0].flatten(0, 1), output.flatten(0, 1)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in seating(model).layers]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(model: Any, path: str, x: Tensor, weights: Tensor, experts: Sequence[Adapter]) -> Tensor:
    layer = model.get_submodule(path)
    total = torch.nn.functional.linear(x, layer.weight, layer.bias).double()
    for column, expert in zip(weights.double().mT, experts, strict=True):
        if path in expert.modules:
            matrix, offset = whole_update(model, path, expert.modules[path])
            total = total + column[:, None] * (x.double() @ matrix.mT + offset)
    return total


SETTINGS: list[dict[str, Any]] = [
    {"router": "arrow", "top_k": 2}, {"router": "arrow", "top_k": 6}, {"router": "norm", "top_k": 1},
    {"router": "projection", "per": "request"}, {"router": "arrow", "per": "token"}, {"router": "uniform"},
    {"experts": {"b": 0.5, "c": -1.5, "e": 0.25}},
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [1, 24])
def test_a_mixture_is_the_weighted_sum_of_all_that_its_experts_add(
    tiny_model: Make, random_adapter: Make, route: Make, setting: dict[str, Any], rows: int
) -> None:
    # One token alone is routed by copies of its experts' rows, many by products over all of them.
    ids = torch.randint(1, 300, (rows, 1 if rows == 1 else 9), generator=seeded(1))
    model = a_base(tiny_model)
    experts = experts_of(random_adapter, model)
    route(model, experts, **setting)
    with trace(model) as traced:
        seen = inputs_and_outputs(model, ids)
    for path, (x, output) in seen.items():
        if path in traced.layers:
            weights = traced.weights(path).flatten(0, 1)
        else:
            given = setting.get("experts", dict.fromkeys("abcdef", 1 / 6))
            weights = torch.tensor([given.get(expert.name, 0.0) for expert in experts]).expand(len(x), -1)
        expected = by_hand(model, path, x, weights, experts)
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()  # a trace keeps weights in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_bases_are_mixed_as_closely_as_they_compute(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype
) -> None:
    model = a_base(tiny_model, dtype)
    experts = experts_of(random_adapter, model)
    route(model, experts, router="uniform")
    weights = torch.full((IDS.numel(), 6), 1 / 6)
    for path, (x, output) in inputs_and_outputs(model, IDS).items():
        expected = by_hand(model, path, x, weights, experts)
        close = 1e-5 if dtype == torch.float32 else 3e-2
        assert (output.double() - expected).abs().max() < close * expected.abs().max()


def test_rows_of_different_settings_are_as_each_alone(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model = a_base(tiny_model)
    route(model, experts_of(random_adapter, model), top_k=2)
    settings: list[Any] = ["arrow", {"experts": ["b"]}, "base", {"experts": {"c": 0.5, "d": 2.0}}, "uniform"]
    ids = torch.randint(1, 300, (5, 7), generator=seeded(2))
    with routing(model, settings):
        together = logits(model, ids)
    for row, setting in enumerate(settings):
        with routing(model, setting):
            assert torch.allclose(together[row], logits(model, ids[row : row + 1])[0], atol=1e-9)


def test_order_company_and_cache_change_nothing(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model = a_base(tiny_model)
    experts = experts_of(random_adapter, model)
    before = logits(route(model, experts, top_k=2))
    mask = torch.stack([torch.arange(9) >= start for start in (0, 4)]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = logits(model, attention_mask=mask, position_ids=positions)
    assert torch.allclose(padded[1, 4:], logits(model, IDS[1:, 4:])[0], atol=1e-9)
    for setting in ("arrow", "uniform"):
        with routing(model, setting), torch.no_grad():
            first = model(input_ids=IDS[:, :5], use_cache=True)
            step = model(input_ids=IDS[:, 5:6], past_key_values=first.past_key_values, use_cache=True)
            assert torch.allclose(step.logits[:, 0], logits(model)[:, 5], atol=1e-9)
    detach(model)
    assert torch.equal(logits(route(model, experts[::-1], top_k=2)), before)


@pytest.mark.parametrize("router", ["arrow", "uniform"])
def test_general_knowledge_is_taken_away_whole(
    tiny_model: Make, random_adapter: Make, route: Make, router: str
) -> None:
    model = a_base(tiny_model)
    experts = experts_of(random_adapter, model)
    route(model, experts, router=router, top_k=2, general=["b", "c"])
    with trace(model) as traced:
        seen = inputs_and_outputs(model, IDS)
    for path, (x, output) in seen.items():
        general = torch.tensor([name in "bc" for name in "abcdef"])
        here = torch.tensor([path in expert.modules for expert in experts])
        weights = (~general & here).double().expand(len(x), -1) / 4
        if router == "arrow":
            weights = traced.weights(path).flatten(0, 1).double()
        weights = weights - (weights[:, ~general].sum(dim=1, keepdim=True) / 2) * general
        expected = by_hand(model, path, x, weights, experts)
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


def test_factors_alone_are_not_mixed_where_an_expert_is_more(
    tiny_model: Make, random_adapter: Make, route: Make
) -> None:
    model = a_base(tiny_model)
    plain, other = (random_adapter(model, name, seeded(ord(name))) for name in "ab")
    for more in (as_dora(other, model, seeded(0)), with_biases(other, seeded(0))):
        with pytest.raises(RouterError, match="mixing factors needs experts that are plain LoRAs, at layer"):
            route(model, [plain, more], mix="factors")
        with pytest.raises(RouterError, match="general_mode='factors' needs experts that are plain LoRAs, at layer"):
            route(model, [plain, more], general=["a"], general_mode="factors")
        route(model, [plain], mix="factors")
        with pytest.raises(RouterError, match="mixing factors needs experts that are plain LoRAs, at layer"):
            add_expert(model, more)
        assert seating(model).experts == ("a",)
        detach(model)


@pytest.mark.parametrize("name", list("abcdef"))
def test_experts_that_come_and_go_are_as_if_seated_anew(
    tiny_model: Make, random_adapter: Make, route: Make, name: str
) -> None:
    model = a_base(tiny_model)
    experts = {expert.name: expert for expert in experts_of(random_adapter, model)}
    others = [expert for expert in experts.values() if expert.name != name]
    with_all, without = (logits(route(a_base(tiny_model), these, top_k=2)) for these in (experts.values(), others))
    route(model, others, top_k=2)
    add_expert(model, experts[name])
    assert torch.allclose(logits(model), with_all, atol=1e-9)
    plain = random_adapter(model, name, seeded(50), rank=experts[name].rank)
    replace_expert(model, plain)
    assert torch.allclose(logits(model), logits(route(a_base(tiny_model), [*others, plain], top_k=2)), atol=1e-9)
    replace_expert(model, experts[name])
    assert torch.allclose(logits(model), with_all, atol=1e-9)
    remove_expert(model, name)
    assert torch.allclose(logits(model), without, atol=1e-9)


def test_layers_of_plain_experts_keep_nothing_for_others(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model = a_base(tiny_model)
    plain, other = (random_adapter(model, name, seeded(ord(name))) for name in "ab")
    partial = random_adapter(model, "c", seeded(3), layers=[1], targets=("q_proj",))
    route(model, [plain, other, as_dora(partial, model, seeded(1))])
    with_beside = [path for path, layer in seating(model).layers.items() if layer.lora.has_beside]
    assert with_beside == ["model.layers.1.self_attn.q_proj"]
    remove_expert(model, "c")
    assert not any(layer.lora.has_beside for layer in seating(model).layers.values())


@pytest.mark.parametrize("router", ["arrow", "lag", "norm", "projection"])
@pytest.mark.parametrize("rows", [1, 24])
def test_compiled_code_leaves_nothing_out(
    tiny_model: Make, random_adapter: Make, route: Make, router: str, rows: int
) -> None:
    ids = torch.randint(1, 300, (rows, 1 if rows == 1 else 9), generator=seeded(1))
    model = a_base(tiny_model, torch.float32)
    experts = experts_of(random_adapter, model)
    route(model, experts, router=router, top_k=2, candidates=4)
    alone = logits(model, ids)
    with trace(model) as traced:
        seen = inputs_and_outputs(model, ids)
    with trace(model):
        assert torch.equal(logits(model, ids), alone)
    assert all(layer.lora.at_once is None for layer in seating(model).layers.values())
    for path, (x, output) in seen.items():
        weights = traced.weights(path).flatten(0, 1)
        expected = by_hand(model, path, x, weights, experts)
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "setting",
    [{"experts": {"b": 0.5, "c": -1.5}}, "uniform", {"router": "projection", "per": "request", "top_k": 2}],
    ids=str,
)
def test_decoding_by_what_is_decided_leaves_nothing_out(
    tiny_model: Make, random_adapter: Make, route: Make, setting: Any
) -> None:
    steps = {}
    for dtype in (torch.float32, torch.float64):  # compiled code knows float32 alone
        model = a_base(tiny_model, dtype)
        route(model, experts_of(random_adapter, model), top_k=2)
        with routing(model, setting), torch.no_grad():
            output = model(input_ids=IDS[:, :5], use_cache=True)
            steps[dtype] = []
            for at in range(5, 9):  # the second step is the first that takes what the one before made ready
                output = model(input_ids=IDS[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
                steps[dtype].append(output.logits.double())
    found, expected = (torch.stack(steps[dtype]) for dtype in (torch.float32, torch.float64))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_fused_plan_steps_aside(
    tiny_model: Make, random_adapter: Make, route: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> Tensor:
        raise AssertionError("a plan that knows factors alone")

    model = a_base(tiny_model, torch.float32)
    expected = logits(route(model, experts_of(random_adapter, model), top_k=1))
    for layer in seating(model).layers.values():
        layer.lora.is_fused = True
    monkeypatch.setattr("lorary.lora.gated.is_fusable", lambda *_args: True)
    monkeypatch.setattr(GatedLora, "_fused", refuse)
    assert torch.equal(logits(model), expected)


def test_a_saved_model_comes_back_and_changed_parts_are_seen(
    tiny_model: Make, random_adapter: Make, route: Make, tmp_path: Any
) -> None:
    model = a_base(tiny_model, torch.float32)
    experts = experts_of(random_adapter, model)
    expected = logits(route(model, experts, top_k=2))
    lorary.save(model, tmp_path / "saved")
    assert torch.equal(logits(lorary.load(tmp_path / "saved", device="cpu")), expected)
    library = seating(model).library
    for name in "bc":
        kept = library.get(name)
        other = as_dora(kept, model, seeded(9)) if name == "b" else with_biases(kept, seeded(9))
        library.remove(name)
        library.add_adapter(other, {"tasks": [name]})
        with pytest.raises(LibraryError, match=f"adapter '{name}' .* must be what is seated in the model"):
            lorary.save(model, tmp_path / f"other-{name}")
        library.remove(name)
        library.add_adapter(kept, {"tasks": [name]})
    lorary.save(model, tmp_path / "again")


def test_an_expert_that_is_a_bias_alone_acts(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model = a_base(tiny_model)
    zero = random_adapter(model, "zero", seeded(1), size=0.0)
    bare = logits(model)
    route(model, [with_biases(zero, seeded(2))], top_k=1)
    alone = logits(model)
    assert (alone - bare).abs().max() > 0.1
    with routing(model, {"experts": ["zero"]}):
        assert torch.allclose(logits(model), alone, atol=1e-9)


def test_an_expert_drawn_anew_keeps_nothing_of_its_own_and_comes_back(
    tiny_model: Make, random_adapter: Make, route: Make
) -> None:
    model = a_base(tiny_model)
    route(model, experts_of(random_adapter, model), router="uniform")
    layer = seating(model).layers["model.layers.0.self_attn.q_proj"].lora
    assert layer.gain is not None
    assert layer.offset is not None
    before = [rows.clone() for rows in (layer.down, layer.up, layer.offset, layer.gain)]
    with drawn_anew(model, "b"):
        for rows, own in zip((layer.offset, layer.gain), before[2:], strict=True):
            assert not torch.equal(rows[1], own[1])
            assert torch.equal(rows[2:], own[2:])
    after = (layer.down, layer.up, layer.offset, layer.gain)
    assert all(torch.equal(rows, own) for rows, own in zip(after, before, strict=True))
