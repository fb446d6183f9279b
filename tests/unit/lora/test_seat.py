"""How a linear layer may be called and what it may return: experts act in every case, or the layer is refused."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorary.errors import AdapterError
from lorary.lora.seat import seat
from lorary.model.logits import target_logits
from lorary.train.onednn import packed_weights

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", ["output", "bias"])


class Twice(nn.Module):
    """A child that adds twice the layer's input."""

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return output + 2 * x


class Beside(nn.Linear):
    """A layer that returns more than its output, or under another keyword."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(8, 8)
        self.wrap = wrap

    def forward(self, hidden: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Any:  # type: ignore[override]
        return self.wrap(super().forward(hidden) * scale + shift)


def seated(layer: nn.Module) -> nn.Module:
    seat(nn.ModuleDict({"layer": layer}), {"layer": Twice()})
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), Conv1D(8, 8)])
@torch.no_grad()
def test_a_layer_called_by_keyword_has_its_experts(layer: nn.Module) -> None:
    expected = layer(X) + 2 * X
    seated(layer)
    name = "x" if isinstance(layer, Conv1D) else "input"
    assert torch.equal(layer(**{name: X}), expected)
    assert torch.equal(layer(X), expected)


@torch.no_grad()
def test_further_arguments_reach_the_layer_and_not_its_experts() -> None:
    layer = Beside(lambda output: output)
    plain = layer(X, 0.5, shift=1.0)
    seated(layer)
    for found in (layer(X, 0.5, shift=1.0), layer(shift=1.0, scale=0.5, hidden=X)):
        assert torch.equal(found, plain + 2 * X)


@pytest.mark.parametrize("wrap", [lambda o: (o, None), lambda o: [o, 3], lambda o: Pair(o, o.sum())])
@torch.no_grad()
def test_what_a_layer_returns_beside_its_output_stays(wrap: Callable[[Tensor], Any]) -> None:
    layer = Beside(wrap)
    plain = layer(X)
    seated(layer)
    found = layer(X)
    assert type(found) is type(plain)
    assert torch.equal(found[0], plain[0] + 2 * X)
    assert found[1] == plain[1]


def test_a_layer_that_returns_or_is_given_no_tensor_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"a routed layer \(Beside\) must compute a tensor\nfound: dict"):
        seated(Beside(lambda output: {"output": output}))(X)
    layer = seated(nn.Linear(8, 8))
    layer.forward = lambda input: X  # type: ignore[method-assign]
    with pytest.raises(AdapterError, match="must be given a tensor\nfound: list"):
        layer(input=[X])


@torch.no_grad()
def test_a_layer_called_twice_in_a_pass_has_its_experts_each_time() -> None:
    layer = nn.Linear(8, 8)
    once = layer(X) + 2 * X
    expected = layer(once) + 2 * once
    seated(layer)
    assert torch.equal(layer(input=layer(X)), expected)


def test_reordered_weights_take_the_keyword_too(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(num_hidden_layers=1)
    layer, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 32)
    expected = layer(x)
    with packed_weights(model):
        assert torch.allclose(layer(input=x), expected, atol=1e-5)


@torch.no_grad()
def test_a_head_called_by_keyword_gives_the_targets_logits(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.data.batching import collate
    from lorary.data.template import Example

    model = tiny_model(num_hidden_layers=1)
    batch = collate([Example((1, 2, 3), (4, 5), 0)])
    expected = target_logits(model, batch)
    call = nn.Module.__call__

    def by_keyword(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is model.lm_head and args:
            return call(self, input=args[0])
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Linear, "__call__", by_keyword)
    assert torch.equal(target_logits(model, batch), expected)
