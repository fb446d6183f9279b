"""Poly and MHR: skills shared by all tasks, mixed factor by factor with weights learned for each task and layer.

Paper: 2202.13914 (Poly), 2211.03831 (MHR). A task's mixture of skills is again one LoRA of the same rank, which is
what makes it cheap to train and exact to export.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.errors import ShapeError
from lorary.lora.stacked import RowTags, TrainedLora

# In the denominator of the weights, as in the paper's code; it decides them where all sigmoids are tiny.
EPSILON = 1e-8


def mixing_weights(logits: Float[Tensor, "*axes skills"]) -> Float[Tensor, "*axes skills"]:
    """Turn assignment logits into weights: each skill is switched by a sigmoid, then shared among those that are on.

    Unlike under a softmax, the skills do not compete for their logits. Logits of zero give all skills alike: that is
    what a task gets which was not trained on.

    Args:
        logits: any real values.

    Returns:
        Weights between 0 and 1; their sum is 1, or less where all logits are below about -15.
    """
    on = torch.sigmoid(logits)
    return on / (on.sum(dim=-1, keepdim=True) + EPSILON)


def mix_factors(
    lora_a: Float[Tensor, "skills rank d_in"],
    lora_b: Float[Tensor, "skills d_out rank"],
    weights: Float[Tensor, "tasks splits skills"],
) -> tuple[Float[Tensor, "tasks rank d_in"], Float[Tensor, "tasks d_out rank"]]:
    """Mix the factors of the skills for each task: block q of lora_a's columns and lora_b's rows by `weights[:, q]`.

    The product of two mixtures holds cross terms, B of one skill with A of another: the mixture of all skills is not
    the mean of what they do. With one split this is Poly; with more, MHR.

    Args:
        lora_a: of the skills.
        lora_b: of the skills.
        weights: of each task and block.

    Returns:
        lora_a and lora_b of each task.

    Raises:
        ShapeError: if the splits do not cut d_in and d_out into equal blocks.
    """
    num_skills, rank, d_in = lora_a.shape
    d_out, num_splits = lora_b.shape[1], weights.shape[1]
    check_splits(num_splits, d_in, d_out, "a mixture")
    blocks_a = lora_a.view(num_skills, rank, num_splits, d_in // num_splits)
    blocks_b = lora_b.view(num_skills, num_splits, d_out // num_splits, rank)
    mixed_a = torch.einsum("tqs,srqd->trqd", weights, blocks_a)
    mixed_b = torch.einsum("tqs,sqdr->tqdr", weights, blocks_b)
    return mixed_a.reshape(-1, rank, d_in), mixed_b.reshape(-1, d_out, rank)


def check_splits(num_splits: int, d_in: int, d_out: int, owner: str) -> None:
    """Check that splits cut a layer into equal blocks.

    Args:
        num_splits: blocks along d_in and along d_out.
        d_in: input features of the layer.
        d_out: output features of the layer.
        owner: the layer, for the error.

    Raises:
        ShapeError: naming the layer and its sizes.
    """
    if num_splits < 1 or d_in % num_splits or d_out % num_splits:
        raise ShapeError(
            f"the splits must cut d_in and d_out of {owner} into equal blocks",
            found=f"{num_splits} splits of d_in {d_in} and d_out {d_out}",
            remedy="choose --splits among the common divisors, or leave the layer out of --target-modules",
        )


class PolyLora(TrainedLora):
    """LoRA skills beside one linear layer; each token of a batch meets the mixture of its own task.

    Args:
        lora_a: leaf tensor that requires a gradient.
        lora_b: leaf tensor that requires a gradient.
        logits: leaf tensor that requires a gradient: the assignment of this layer.
        scaling: alpha / rank.
        tags: as for `TrainedLora`.
        path: likewise.

    Raises:
        ShapeError: if the splits of the logits do not cut the layer into equal blocks.
    """

    def __init__(
        self,
        lora_a: Float[Tensor, "skills rank d_in"],
        lora_b: Float[Tensor, "skills d_out rank"],
        logits: Float[Tensor, "tasks splits skills"],
        scaling: float,
        tags: RowTags,
        path: str,
    ) -> None:
        super().__init__(tags, path, lora_a.dtype)
        check_splits(logits.shape[1], lora_a.shape[2], lora_b.shape[1], f"layer '{path}'")
        self.lora_a, self.lora_b, self.logits, self.scaling = lora_a, lora_b, logits, scaling

    def of_spans(self) -> tuple[Tensor, Tensor]:
        """As `TrainedLora.of_spans`."""
        # One mixture per span, although several may be of one task: to mix costs a small part of one token of the
        # base, and to find the distinct tasks would cost a look at the device in every layer.
        weights = mixing_weights(self.logits).index_select(0, self.tags.tasks)
        lora_a, lora_b = mix_factors(self.lora_a, self.lora_b, weights)
        return lora_a, lora_b.mT * self.scaling
