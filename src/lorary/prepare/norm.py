"""The calibration of router `norm`: how long an expert's updates are on its own rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.template import Example
from lorary.errors import TaskError
from lorary.lora.gated import GatedLora
from lorary.prepare.expert_layers import watch_expert
from lorary.prepare.measure import MeasureContext, Tensors


def expert_norms(context: MeasureContext, name: str, examples: Sequence[Example]) -> tuple[Tensors, dict[str, Any]]:
    """The calibration of an expert of the library."""
    return norm_statistics(context.base.model, context.library.get(name), examples), {}


def norm_statistics(model: Any, adapter: Adapter, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Mean and deviation of `‖ΔW x‖` over the tokens of the expert's own data, in each adapted layer.

    The first token of each row is left out: attention sinks there, and its hidden states may be a hundred times as
    long as all others. An update that is zero has mean 0 and deviation 1. Source: SEQR, arXiv 2509.18093.

    Args:
        model: the bare base model.
        adapter: the expert.
        examples: rows of its own data.

    Returns:
        (2,) for each layer, in the dtype of the experts.

    Raises:
        TaskError: if there are no two tokens of different norm.
    """
    norms: dict[str, list[Tensor]] = {path: [] for path in adapter.modules}

    def look(path: str, lora: GatedLora, x: Tensor, z: Tensor, lengths: Tensor) -> None:
        position = torch.arange(x.shape[1], device=x.device)
        counted = (position > 0) & (position < lengths[:, None])
        norms[path].append(torch.linalg.vector_norm(z[counted] @ lora.up, dim=-1).double())

    dtypes = watch_expert(model, adapter, examples, look)
    moments = {}
    for path, parts in norms.items():
        lengths = torch.cat(parts)
        deviation, mean = torch.std_mean(lengths, correction=0) if len(lengths) else lengths.new_zeros(2)
        if deviation == 0 and (len(lengths) == 0 or lengths.any()):
            raise TaskError(
                f"the data of expert '{adapter.name}' must have tokens of different norms at {path}",
                found=f"{len(lengths)} tokens",
                remedy="raise --rows",
            )
        moments[path] = torch.stack([mean, deviation if deviation > 0 else torch.ones_like(mean)]).to(dtypes[path])
    return moments
