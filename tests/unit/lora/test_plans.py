"""The plans of a routed layer have one result: dense, gathered, and compiled where there is a compiler."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.lora import gated, plans
from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.model.attach import routing
from lorary.model.live import remove_expert
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.ops.choose import Chosen
from lorary.ops.native import NativeRoute, native

Make = Callable[..., Any]
SETTINGS: list[Any] = [
    {"router": "arrow", "top_k": 2},
    {"router": "arrow", "top_k": 2, "temperature": 0.3, "allow": ["e01", "e04", "e05", "e07"]},
    {"router": "arrow", "top_k": 3, "null": 0.1, "scale": "unit"},
    {"router": "arrow", "top_k": 3, "top_p": 0.7, "input_norm": "layer"},
    {"router": "arrow", "top_k": 2, "tie": "concat", "zeros": "keep"},
    {"router": "arrow", "per": "token", "top_k": 2},
    {"router": "arrow", "per": "request", "top_k": 2},
    [{"router": "arrow"}, {"experts": {"e03": 0.5, "e08": -1.0}}, "base", {"per": "request", "top_k": 1}],
]
# Their rules read all down-projections: the gathered plan has no part in them.
OF_ALL_Z: list[Any] = [
    {"router": "projection", "top_k": 2},
    {"router": "projection", "top_k": 3, "input_norm": "unit", "per": "token"},
    {"router": "norm", "top_k": 2, "allow": ["e01", "e04", "e05", "e07"]},
    {"router": "norm", "top_k": 3, "per": "request"},
    {"router": "lag", "top_k": 2, "candidates": 5},
    {"router": "lag", "top_k": 4, "candidates": 2},
    [{"router": "norm"}, {"router": "lag", "top_k": 1}],
]
PLANS = ("dense", "gathered", "compiled")


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Twelve experts of ranks 1 to 4, one of which lacks layers."""
    model = tiny_model()
    adapters = [
        random_adapter(model, f"e{i:02}", generator, rank=1 + i % 4, layers=[1] if i == 5 else None) for i in range(12)
    ]
    return route(model, adapters)


def only(plan: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let no other plan run; the list fills with the plans that did."""
    ran: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return function(*args, **kwargs)

        return call

    for name in PLANS:
        monkeypatch.setattr(plans, name, counted(name, getattr(plans, name)))
    monkeypatch.setattr(NativeRoute, "__call__", counted("compiled", NativeRoute.__call__))
    if plan != "compiled":
        monkeypatch.setattr(gated, "is_native", lambda tensor: False)
    if plan == "dense":
        monkeypatch.setattr(GatedLora, "_is_gathered", lambda self, gate, num_tokens: False)
    if plan == "gathered":
        monkeypatch.setattr(GatedLora, "_is_gathered", lambda self, gate, num_tokens: not gate.reads_z)
    return ran


@torch.no_grad()
def passes(model: Any, setting: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a prompt and of one more token behind it, and the routing weights."""
    ids = torch.arange(4 * 11).view(4, 11) % 290 + 1
    with routing(model, setting), trace(model) as traced:
        first = model(input_ids=ids, use_cache=True)
        second = model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
    with routing(model, setting):  # without a trace in the way
        again = model(input_ids=ids, use_cache=False)
    assert torch.allclose(again.logits, first.logits, atol=1e-4)
    return first.logits, second.logits, traced.stacked()


@pytest.mark.parametrize(
    ("plan", "setting"),
    [*((plan, setting) for plan in PLANS[1:] for setting in SETTINGS), *(("compiled", own) for own in OF_ALL_Z)],
    ids=str,
)
def test_plans_agree(plan: str, setting: Any, routed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if plan == "compiled" and native() is None:
        pytest.skip("no C++ compiler, or LORARY_NATIVE=0")
    with pytest.MonkeyPatch.context() as patch:
        assert not only("dense", patch)
        expected = passes(routed, setting)
    ran = only(plan, monkeypatch)
    found = passes(routed, setting)
    assert set(ran) == {plan}
    with routing(routed, "base"):
        bare = routed(input_ids=torch.arange(4 * 11).view(4, 11) % 290 + 1).logits
    scale = float((expected[0] - bare).norm())
    assert scale > 0
    for own, other in zip(found[:2], expected[:2], strict=True):
        assert float((own - other).norm()) <= 1e-5 * scale
    assert torch.allclose(found[2], expected[2], atol=1e-5)


def test_gradients_go_through_a_routed_layer_whatever_the_plan(routed: Any) -> None:
    embedded = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with routing(routed, {"router": "arrow", "top_k": 2}):
        routed(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.isfinite().all())
    assert bool(embedded.grad.any())


@pytest.mark.skipif(native() is None, reason="no C++ compiler, or LORARY_NATIVE=0")
def test_what_was_looked_up_for_one_call_is_forgotten_when_experts_change(
    routed: Any, generator: torch.Generator
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first = routed(input_ids=ids).logits
        lora = seating(routed).layers["model.layers.1.self_attn.q_proj"].lora
        assert lora.at_once is not None
        assert torch.equal(routed(input_ids=ids).logits, first)
        with trace(routed):
            assert torch.equal(routed(input_ids=ids).logits, first)
        assert torch.equal(copy.deepcopy(routed)(input_ids=ids).logits, first)
        remove_expert(routed, "e03")
        assert lora.at_once is None
        with routing(routed, {"experts": ["e01"]}):
            assert lora.in_force.at_once is None
            fixed = routed(input_ids=ids).logits
        routed.double().float()
        with routing(routed, {"experts": ["e01"]}):
            assert torch.allclose(routed(input_ids=ids).logits, fixed, atol=1e-5)
        changed = routed(input_ids=ids).logits
    assert not torch.allclose(changed, first, atol=1e-3)


def test_a_gate_that_is_trained_gets_its_gradient_for_few_tokens_too(generator: torch.Generator) -> None:
    down, up = torch.randn(9, 4, generator=generator), torch.randn(6, 5, generator=generator)
    lora = GatedLora(down, up, torch.arange(3).repeat_interleave(2))
    weight = torch.ones(1, 1, requires_grad=True)

    class Trained(torch.nn.Module):
        reads_prototypes, reads_z, most, quick, decided = False, False, 1, None, None

        def forward(self, seen: LayerInput) -> Chosen:
            return Chosen(torch.ones(len(seen.x), 1, dtype=torch.int64), weight.expand(len(seen.x), 1))

    lora.route_by(Trained(), "outputs")
    x = torch.randn(2, 4, generator=generator)
    found = lora(x, torch.zeros(2, 5))
    assert torch.allclose(found, x @ down[2:4].mT @ up[2:4], atol=1e-5)
    found.sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad.sum(), found.sum(), atol=1e-4)
