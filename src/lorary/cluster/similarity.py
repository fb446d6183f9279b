"""Similarity of adapters: cosine between their whole updates, through rank x rank products only."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter
from lorary.ops.gram import delta_gram


def adapter_similarity(adapters: Sequence[Adapter]) -> Float[Tensor, "experts experts"]:
    """Cosine similarity between the updates of adapters, all layers taken together.

    It compares what the adapters compute and not their factors, so that the gauge (A -> GA, B -> BG⁻¹), the initial
    draw and unequal ranks play no part. A layer that one of two adapters lacks counts as zero for it.

    Args:
        adapters: at least one.

    Returns:
        Symmetric matrix in float64, ones on the diagonal; an adapter that computes nothing is similar to none (0).
    """
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        members = [(i, a.modules[path]) for i, a in enumerate(adapters) if path in a.modules]
        lora_a = torch.cat([f.lora_a.double() for _, f in members])
        lora_b = torch.cat([f.lora_b.double() * f.scaling for _, f in members], dim=1)
        expert_of_rank = torch.tensor([i for i, f in members for _ in range(f.rank)])
        gram += delta_gram(lora_a, lora_b, expert_of_rank, len(adapters))
    norms = gram.diagonal().clamp_min(0).sqrt()
    outer = norms[:, None] * norms
    similarity = torch.where(outer > 0, gram / outer.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return similarity.fill_diagonal_(1.0)
