"""A base model with an adapter added to its weights: an ordinary model, which needs nothing of Lorary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapter import Adapter
from lorary.errors import AdapterError
from lorary.lora.seat import find_linear
from lorary.model.beside import beside_of

# Of the effect of the adapter on the logits: what float32 leaves between adding updates to weights and to outputs.
MOST_DIFFERENCE = 1e-3


def add_to_weights(model: nn.Module, adapter: Adapter) -> None:
    """Add the update of every adapted layer to the layer's weight, in float64, rounded once to the weight's dtype.

    A bias beside lora_b is added to the layer's own. The magnitudes of a DoRA scale the sum.

    Args:
        model: the bare base model, changed in place.
        adapter: that fits it.

    Raises:
        AdapterError: if it does not fit, a weight is no plain matrix of floats (a quantised one), a weight is that of
            another layer too, which the update would change along, or there is no bias to add one to; nothing is
            changed then.
    """
    layers = {path: _layer(model, path, adapter) for path in adapter.modules}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    changed = [(path, layer.weight) for path, layer in layers.items()]
    changed += [(path, layer.bias) for path, layer in layers.items() if adapter.modules[path].bias is not None]
    for path, weight in changed:
        if len(names := owners.get(id(weight), [])) > 1:
            raise AdapterError(
                f"adapter '{adapter.name}' must adapt weights of one layer each to be merged into the base",
                found=f"{path}, whose weight is that of {', '.join(n for n in names if not n.startswith(path))} too",
                remedy="export it for peft: there the update acts on that layer alone",
            )
    gains = {path: beside_of(layer, path, adapter.name, adapter.modules[path]).gain for path, layer in layers.items()}
    with torch.no_grad():
        for path, layer in layers.items():
            factors, weight, gain = adapter.modules[path], layer.weight, gains[path]
            update = factors.scaling * (factors.lora_b.double() @ factors.lora_a.double()).to(weight.device)
            merged = (weight.double().mT if hasattr(layer, "nx") else weight.double()) + update
            if gain is not None:
                merged *= 1 + gain[:, None].to(weight.device)
            weight.copy_(merged.mT if hasattr(layer, "nx") else merged)
            if factors.bias is not None:
                layer.bias.copy_(layer.bias.double() + factors.scaling * factors.bias.double().to(weight.device))


def _layer(model: nn.Module, path: str, adapter: Adapter) -> Any:
    """A layer whose weight, and bias where the adapter has one, are plain floats that can be changed."""
    factors = adapter.modules[path]
    layer: Any = find_linear(model, path, adapter.name, factors.d_in, factors.d_out)
    weight = layer.weight
    if not (isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2):
        raise AdapterError(
            f"adapter '{adapter.name}' must adapt plain weights to be merged into the base",
            found=f"{path}, a {type(layer).__name__}",
            remedy="load the base without quantisation",
        )
    if factors.bias is not None and not isinstance(getattr(layer, "bias", None), nn.Parameter):
        raise AdapterError(
            f"adapter '{adapter.name}' must add its biases (lora_bias) to biases of the base to be merged into it",
            found=f"{path}, a layer without a bias",
            remedy="export it for peft, or route to it",
        )
    return layer


def relative_difference(logits: Tensor, expected: Tensor, bare: Tensor) -> float:
    """The largest difference of logits, relative to the largest effect that the adapter has on them.

    Args:
        logits: of the model in question.
        expected: of the routed model.
        bare: of the base.
    """
    effect = float((expected.double() - bare.double()).abs().max())
    difference = float((logits.double() - expected.double()).abs().max())
    return difference / effect if effect else difference


def check_merged(adapter: str, difference: float) -> None:
    """Refuse a merged model that computes something else than the routed one.

    Args:
        adapter: its name.
        difference: as `relative_difference` gives it, in float32.

    Raises:
        AdapterError: if it is not explained by rounding.
    """
    if not difference <= MOST_DIFFERENCE:
        raise AdapterError(
            f"the base merged with '{adapter}' must give the logits of the routed model within {MOST_DIFFERENCE:g} of "
            "the adapter's effect",
            found=f"{difference:.2g}",
            remedy="export it for peft, and report the base model: it reads weights in another way",
        )


def probe_logits(model: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    """The logits of a fixed batch, float32."""
    with torch.no_grad():
        logits: Tensor = model(**tokens).logits
    return logits.float()
