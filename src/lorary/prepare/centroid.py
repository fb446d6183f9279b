"""Centroid's data: the mean input of each layer on an expert's own rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.template import Example
from lorary.lora.gated import GatedLora
from lorary.prepare.expert_layers import watch_expert
from lorary.prepare.measure import MeasureContext, Tensors


def expert_centroids(context: MeasureContext, name: str, examples: Sequence[Example]) -> tuple[Tensors, dict[str, Any]]:
    """The centroids of an expert of the library."""
    return layer_centroids(context.base.model, context.library.get(name), examples), {}


def layer_centroids(model: Any, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Mean input of each adapted layer at the last token of each row.

    Paper: 2405.11157, centroid matching; there too the expert acts, and the last token stands for its row.

    Args:
        model: the bare base model.
        adapter: the expert.
        examples: rows of its own data, at least one.

    Returns:
        (d_in,) for each layer, in the dtype of the experts.
    """
    sums: dict[str, Tensor] = {}

    def look(path: str, _lora: GatedLora, x: Tensor, _z: Tensor, lengths: Tensor) -> None:
        last = x[torch.arange(len(x), device=x.device), lengths - 1].double().sum(dim=0)
        sums[path] = sums.get(path, torch.zeros_like(last)) + last

    dtypes = watch_expert(model, adapter, examples, look)
    return {path: (total / len(examples)).to(dtypes[path]) for path, total in sums.items()}
