"""A base model with an adapter added to its weights: an ordinary model, which needs nothing of Lorary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorary.adapter import Adapter
from lorary.errors import AdapterError
from lorary.lora.seat import find_linear

# Of the effect of the adapter on the logits: what float32 leaves between adding updates to weights and to outputs.
MOST_DIFFERENCE = 1e-3


def add_to_weights(model: nn.Module, adapter: Adapter) -> None:
    """Add the update of every adapted layer to the layer's weight, in float64, rounded once to the weight's dtype.

    Args:
        model: the bare base model, changed in place.
        adapter: that fits it.

    Raises:
        AdapterError: if it does not fit, a weight is no plain matrix of floats (a quantised one), or a weight is that
            of another layer too, which the update would change along; nothing is changed then.
    """
    weights = {path: _weight(model, path, adapter) for path in adapter.modules}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, (weight, _) in weights.items():
        if len(names := owners.get(id(weight), [])) > 1:
            raise AdapterError(
                f"adapter '{adapter.name}' must adapt weights of one layer each to be merged into the base",
                found=f"{path}, whose weight is that of {', '.join(n for n in names if not n.startswith(path))} too",
                remedy="export it for peft: there the update acts on that layer alone",
            )
    with torch.no_grad():
        for path, (weight, is_transposed) in weights.items():
            factors = adapter.modules[path]
            update = factors.scaling * (factors.lora_b.double() @ factors.lora_a.double())
            weight.copy_(weight.double() + (update.mT if is_transposed else update).to(weight.device))


def _weight(model: nn.Module, path: str, adapter: Adapter) -> tuple[Tensor, bool]:
    """The weight of a layer, and whether it is (d_in, d_out), as that of Conv1D."""
    factors = adapter.modules[path]
    layer: Any = find_linear(model, path, adapter.name, factors.d_in, factors.d_out)
    weight = layer.weight
    if not (isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.ndim == 2):
        raise AdapterError(
            f"adapter '{adapter.name}' must adapt plain weights to be merged into the base",
            found=f"{path}, a {type(layer).__name__}",
            remedy="load the base without quantisation",
        )
    return weight, hasattr(layer, "nx")


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
