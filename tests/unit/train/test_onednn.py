"""Reordered weights multiply as the layer's own do, and are gone afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorary.train.onednn import packed_bytes, packed_weights

Make = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Make) -> Any:
    model = tiny_model()
    if not packed_bytes(model):
        pytest.skip("this machine has no oneDNN for x86")
    return model


def logits_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of some embeddings, and the gradient that reaches these."""
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = model(inputs_embeds=x).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), x)
    return logits.detach(), gradient


def test_logits_and_gradients_stay_up_to_rounding(model: Any) -> None:
    wanted = logits_and_gradient(model)
    with packed_weights(model):
        found = logits_and_gradient(model)
    for own, reference in zip(found, wanted, strict=True):
        assert float((own - reference).norm()) < 1e-5 * float(reference.norm())
    for own, reference in zip(logits_and_gradient(model), wanted, strict=True):
        assert torch.equal(own, reference)


def test_a_layer_with_a_bias_keeps_it(tiny_model: Make, model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.bias = nn.Parameter(torch.arange(layer.out_features, dtype=torch.float32), requires_grad=False)
    x = torch.ones(3, layer.in_features)
    with packed_weights(model):
        assert "forward" in vars(layer)
        found = layer(x)
    assert torch.allclose(found, layer(x), atol=1e-5)


def test_all_linear_layers_but_the_head_are_reordered_twice(model: Any) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    head = model.get_output_embeddings()
    assert packed_bytes(model) == 2 * sum(layer.weight.nbytes for layer in layers if layer is not head)
    with packed_weights(model):
        assert ["forward" in vars(layer) for layer in layers] == [layer is not head for layer in layers]
    assert not any("forward" in vars(layer) for layer in layers)


def test_weights_that_are_trained_or_of_another_dtype_are_left_alone(tiny_model: Make, model: Any) -> None:
    before = packed_bytes(model)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    assert packed_bytes(model) == before - 2 * weight.nbytes
    assert packed_bytes(tiny_model(dtype=torch.float64)) == 0


def test_a_base_beyond_the_budget_and_a_machine_without_onednn_keep_their_weights(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.train.onednn.MOST_BYTES", packed_bytes(model) - 1)
    assert packed_bytes(model) == 0
    with packed_weights(model):
        assert "forward" not in vars(model.model.layers[0].mlp.up_proj)
    monkeypatch.undo()
    assert packed_bytes(model) > 0
    monkeypatch.setattr("lorary.train.onednn._onednn.is_available", lambda: False)
    assert packed_bytes(model) == 0
