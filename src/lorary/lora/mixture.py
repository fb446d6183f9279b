"""Seated adapters mixed by weights that are learnt or tried out: each token meets the mixture of its own unit.

Mixed by outputs, `Σ w_e ΔW_e x` (LoRA Soups' CAT, 2410.13025); mixed by factors, `(Σ w_e B_e)(Σ w_e A_e) x` (the
paper's mixtures of a library, 2405.11157; LoraHub, 2307.13269). Weights are free numbers and are not normalised.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.lora.poly import mix_factors
from lorary.lora.stacked import RowTags, TrainedLora


class OutputMixture(TrainedLora):
    """Frozen adapters beside one linear layer, mixed by outputs; only the weights have gradients.

    Args:
        down: rank-concatenated lora_a.
        up: rank-concatenated lora_b, transposed and scaled.
        sizes: rank of each adapter.
        weights: leaf tensor.
        tags: as for `TrainedLora`.
        path: likewise.
    """

    def __init__(
        self,
        down: Float[Tensor, "ranks d_in"],
        up: Float[Tensor, "ranks d_out"],
        sizes: Tensor,
        weights: Float[Tensor, "slots experts"],
        tags: RowTags,
        path: str,
    ) -> None:
        super().__init__(tags, path, down.dtype)
        self.down, self.up, self.sizes, self.weights = down, up, sizes, weights

    def add(self, x: Tensor, output: Tensor) -> Tensor:
        """As `TrainedLora.add`."""
        by_rank = self.weights.repeat_interleave(self.sizes, dim=1).index_select(0, self.tags.slots)
        lengths = torch.tensor(self.tags.lengths, device=by_rank.device)
        by_token = by_rank.repeat_interleave(lengths, dim=0, output_size=x.shape[0] * x.shape[1])
        z = (x.to(self.down.dtype) @ self.down.mT) * by_token.view(*x.shape[:2], -1)  # (sequences, seq, ranks)
        return output + (z @ self.up).to(output.dtype)


class FactorMixture(TrainedLora):
    """Adapters of one rank beside one linear layer, mixed by factors; the factors may have gradients too.

    Args:
        lora_a: of the adapters; a leaf tensor where they are tuned.
        lora_b: likewise.
        weights: leaf tensor.
        scaling: of the product.
        tags: as for `TrainedLora`.
        path: likewise.
    """

    def __init__(
        self,
        lora_a: Float[Tensor, "experts rank d_in"],
        lora_b: Float[Tensor, "experts d_out rank"],
        weights: Float[Tensor, "slots experts"],
        scaling: float,
        tags: RowTags,
        path: str,
    ) -> None:
        super().__init__(tags, path, lora_a.dtype)
        self.lora_a, self.lora_b, self.weights, self.scaling = lora_a, lora_b, weights, scaling

    def of_spans(self) -> tuple[Tensor, Tensor]:
        """As `TrainedLora.of_spans`."""
        # One mixture per unit, of which there are fewer than spans.
        lora_a, lora_b = mix_factors(self.lora_a, self.lora_b, self.weights[:, None])
        slots = self.tags.slots
        return lora_a.index_select(0, slots), lora_b.mT.index_select(0, slots) * self.scaling
