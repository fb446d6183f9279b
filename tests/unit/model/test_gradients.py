"""Gradients flow through a routed model: to what it is given, to the base, and to the experts' stacked factors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lorary.model.attach import routing
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (2, 6), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Three experts of unequal ranks over one layer of a base in float64."""
    model = tiny_model(dtype=torch.float64, num_hidden_layers=1)
    return route(model, [random_adapter(model, name, generator, rank=2 + i) for i, name in enumerate("abc")], top_k=2)


@pytest.mark.parametrize("setting", ["arrow", "projection", "norm", "uniform", {"experts": {"b": 0.5}}])
def test_a_layer_has_the_gradients_of_its_definition(routed: Any, setting: Any) -> None:
    lora = seating(routed).layers["model.layers.0.self_attn.q_proj"].lora
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(2, 3, 32, dtype=torch.float64, generator=generator) for _ in "xo")
    with routing(routed, setting):
        # A finite difference is far smaller than the distance between scores: the choice stays as it is.
        assert torch.autograd.gradcheck(lora, (x.requires_grad_(), output.requires_grad_()), atol=1e-6)


def gradient_of_embeddings(model: Any) -> Tensor:
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
    assert embeddings.grad is not None
    return embeddings.grad


def test_stacked_factors_can_be_trained_under_a_router_that_looks_at_tokens(routed: Any) -> None:
    layers = seating(routed).layers
    factors = [tensor for layer in layers.values() for tensor in (layer.lora.down, layer.lora.up)]
    for tensor in factors:
        tensor.requires_grad_()
    before = gradient_of_embeddings(routed)
    for tensor in factors:
        assert tensor.grad is not None
        assert tensor.grad.any()
    with torch.no_grad():
        for tensor in factors:
            tensor -= 1e-3 * tensor.grad
    assert not torch.allclose(gradient_of_embeddings(routed), before)  # the next pass uses what was learned


def checkpoint(model: Any) -> None:
    """Keep no activations inside transformer layers, under the name that this version of transformers has for it."""
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
    model.train()


SETTINGS: list[Any] = ["arrow", {"per": "token"}, {"per": "request"}, "uniform", ["base", "norm"]]


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_checkpointing_changes_no_gradient(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, setting: Any
) -> None:
    model = tiny_model(dtype=torch.float64)
    route(model, [random_adapter(model, name, generator) for name in "abc"], top_k=2)
    with routing(model, setting):
        expected = gradient_of_embeddings(model)
        checkpoint(model)
        assert model.is_gradient_checkpointing
        assert torch.allclose(gradient_of_embeddings(model), expected, rtol=1e-9, atol=1e-9)


FROZEN: list[Any] = ["arrow", "projection", "lag", {"router": "arrow", "threshold": 0.0}, {"per": "request"}]


@pytest.fixture
def single(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Three experts over a base in float32, where compiled code acts."""
    model = tiny_model(num_hidden_layers=1)
    return route(model, [random_adapter(model, name, generator) for name in "abc"], top_k=1)


def watched(model: Any, setting: Any, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> tuple[Any, Any]:
    """What compiled code makes of some work after a pass that it took, and what PyTorch makes of it."""
    with routing(model, setting):
        with torch.no_grad():
            model(input_ids=IDS[:1, :3], use_cache=False)
        ours = work()
        with monkeypatch.context() as context:
            context.setattr("lorary.lora.gated.is_native", lambda _: False)
            for layer in seating(model).layers.values():
                layer.lora.in_force.at_once = None
            return ours, work()


@pytest.mark.parametrize("num_tokens", [2, 6])
@pytest.mark.parametrize("setting", FROZEN)
def test_a_layers_own_weights_have_their_gradients_where_embeddings_are_frozen(
    single: Any, setting: Any, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = single.model.layers[0].self_attn.q_proj.weight.requires_grad_()

    def gradient() -> Tensor:
        weight.grad = None
        single(input_ids=IDS[:, :num_tokens], use_cache=False).logits.square().sum().backward()
        assert weight.grad is not None, "the gradient is lost"
        return weight.grad

    ours, plain = watched(single, setting, monkeypatch, gradient)
    assert plain.any()
    assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


# What PyTorch itself runs when forward derivatives are first asked for.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("setting", [*FROZEN[:4], {"router": "arrow", "top_k": 2}])
def test_forward_derivatives_and_functional_transforms_see_the_experts(
    single: Any, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = seating(single).layers["model.layers.0.self_attn.q_proj"].lora
    generator = torch.Generator().manual_seed(3)
    x, output, tangent = (torch.randn(1, 3, 32, generator=generator) for _ in "xot")

    def forward_mode() -> tuple[Tensor]:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            found = torch.autograd.forward_ad.unpack_dual(lora(dual, output)).tangent
            assert found is not None, "the derivative is lost"
            return (found.clone(),)

    def transforms() -> tuple[Tensor, Tensor]:
        jvp = torch.func.jvp(lambda given: lora(given, output), (x,), (tangent,))[1]
        gradient = torch.func.grad(lambda given: lora(given, output).square().sum())(x)
        return jvp, gradient

    for work in (forward_mode, transforms):
        ours, plain = watched(single, setting, monkeypatch, work)
        for left, right in zip(ours, plain, strict=True):
            assert torch.allclose(left, right, rtol=1e-4, atol=1e-5)


def test_rows_of_a_router_can_be_trained(single: Any) -> None:
    with routing(single, {"router": "arrow", "top_k": 2, "tie": "concat"}):
        lora = seating(single).layers["model.layers.0.self_attn.q_proj"].lora
        x, output = torch.randn(2, 32), torch.zeros(2, 32)
        lora(x, output)
        rows = lora.in_force.gate.score_rows.requires_grad_()
        lora(x, output).square().sum().backward()
        assert rows.grad is not None
        assert rows.grad.any()


@pytest.mark.parametrize("setting", [{}, "norm"])
def test_factors_given_for_one_call_are_those_that_count(single: Any, setting: Any) -> None:
    lora = seating(single).layers["model.layers.0.self_attn.q_proj"].lora
    x, output = torch.randn(2, 32), torch.zeros(2, 32)
    with routing(single, setting), torch.no_grad():
        plain = lora(x, output)
        doubled = torch.func.functional_call(lora, {"up": lora.up * 2}, (x, output))
        assert torch.allclose(doubled, plain * 2, atol=1e-5)
        assert torch.allclose(lora(x, output), plain, atol=1e-6)


def test_a_tracer_and_a_dispatch_mode_see_what_the_experts_do(single: Any) -> None:
    lora = seating(single).layers["model.layers.0.self_attn.q_proj"].lora
    x, other, output = (torch.randn(2, 32) for _ in range(3))
    with torch.no_grad():
        lora(x, output)
        with FlopCounterMode(display=False) as counter:
            lora(x, output)
        assert counter.get_total_flops() > 0
        traced = make_fx(lambda given: lora(given, output))(x)
        assert torch.allclose(traced(other), lora(other, output), atol=1e-5)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_a_users_default_dtype_changes_no_trace(single: Any, default: torch.dtype) -> None:
    with torch.no_grad(), trace(single) as expected:
        single(input_ids=IDS, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.no_grad(), trace(single) as ours:
            single(input_ids=IDS, use_cache=False)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(ours.stacked(), expected.stacked())


def test_numbers_whose_sign_is_put_off_are_read_right(single: Any) -> None:
    lora = seating(single).layers["model.layers.0.self_attn.q_proj"].lora
    x, output = torch.randn(2, 32, dtype=torch.complex64), torch.zeros(2, 32)
    lazy = x.conj().imag
    assert lazy.is_neg()
    with torch.no_grad():
        expected = lora(lazy.clone().resolve_neg().contiguous(), output)
        assert torch.allclose(lora(lazy, output), expected, atol=1e-6)
