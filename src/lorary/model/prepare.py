"""Giving a routed model what a rule needs beyond weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorary.errors import UsageError
from lorary.model.seating import seating
from lorary.route import ROUTERS


def prepare(model: Any, kind: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a routed model what a rule needs beyond weights.

    Args:
        model: a routed model.
        kind: that of `lorary.route.rule.Data`, which says the shapes; for a whole request the features follow
            (`retrieval_early`), and the path is `request`.
        tensors: by expert and path of the layer.

    Raises:
        UsageError: if no experts are seated in the model, a number is not finite, or a deviation is not above 0.
    """
    state = seating(model)
    data = [rule.data for rule in ROUTERS.values() if rule.data is not None and rule.data.holds == "moments"]
    is_moments = kind in {name for each in data for name in (each.kind, each.yardstick_kind)}
    for name, by_path in tensors.items():
        for path, tensor in by_path.items():
            if is_moments and (tensor.shape != (2,) or not bool(tensor.isfinite().all()) or float(tensor[1]) <= 0):
                raise UsageError(
                    f"'{kind}' of expert '{name}' at {path} must be a mean and a deviation above 0",
                    found=tensor.tolist(),
                )
            if not bool(tensor.isfinite().all()):
                raise UsageError(f"'{kind}' of expert '{name}' at {path} must be finite", found="NaN or infinity")
    state.prepared[kind] = {name: dict(by_path) for name, by_path in tensors.items()}
