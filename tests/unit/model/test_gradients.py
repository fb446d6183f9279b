"""Gradients flow through a routed model: to what it is given, to the base, and to the experts' stacked factors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.model.attach import routing, seating

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
