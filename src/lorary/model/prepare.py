"""Giving a routed model what a rule needs beyond weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorary.errors import UsageError
from lorary.model.seating import seating


def prepare(model: Any, kind: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give a routed model what a rule needs beyond weights.

    Args:
        model: a routed model.
        kind: `centroid` or `phatgoose`, (d_in,) each; `norm_calibration` or `contrast`, (2,) means and
            deviations of scores;
            `task_predictor_FEATURES` or `retrieval_FEATURES`, one vector for an expert, under the path `request`.
        tensors: by expert and path of the layer.

    Raises:
        UsageError: if no experts are seated in the model, or a deviation is not above 0.
    """
    state = seating(model)
    if kind.endswith("_calibration") or kind == "contrast":
        for name, by_path in tensors.items():
            for path, known in by_path.items():
                if known.shape != (2,) or not bool(known.isfinite().all()) or float(known[1]) <= 0:
                    raise UsageError(
                        f"'{kind}' of expert '{name}' at {path} must be a mean and a deviation above 0",
                        found=known.tolist(),
                    )
    for name, by_path in tensors.items():
        if wrong := [path for path, known in by_path.items() if not bool(known.isfinite().all())]:
            raise UsageError(
                f"'{kind}' of expert '{name}' at {wrong[0]} must be finite numbers", found="NaN or infinity"
            )
    state.prepared[kind] = {name: dict(by_path) for name, by_path in tensors.items()}
