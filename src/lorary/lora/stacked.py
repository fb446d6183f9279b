"""Training of many experts beside one linear layer: stacked factors, rows tagged with their expert."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorary.errors import ShapeError
from lorary.keys import keyed_generator


@dataclass
class RowTags:
    """Which experts the rows of the running batch belong to; one object shared by all layers of a model.

    A batch holds the same number of rows for each of its experts, one expert after the other.

    Args:
        experts: (experts in the batch,) int64 on the device of the factors, positions in the stacks.
        names: names of those experts, for the keys of dropout.
        lengths: padded length that each expert's rows would have alone; dropout draws no more than that.
        dropout: probability of dropping an input feature, 0 outside training.
        key: (seed, step, first row) of the batch, the row counted among those of each expert.
    """

    experts: Tensor
    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    dropout: float = 0.0
    key: tuple[int, ...] = ()


class StackedLora(nn.Module):
    """LoRA factors of many experts for one linear layer; each row of a batch meets the factors of its own expert.

    Nothing of one expert reaches another: rows only multiply their own factors, so that the gradient of the summed
    losses is, expert by expert, what training it alone would give. The rank axis is the largest of the stack; a
    smaller expert has zero rows and columns there, whose gradients are zero, so that they stay zero.

    Args:
        lora_a: leaf tensor that requires a gradient.
        lora_b: leaf tensor that requires a gradient.
        scaling: alpha / rank of each expert.
        tags: shared by all layers, set before each forward pass.
        path: path of the layer, part of the key of its dropout.
    """

    def __init__(
        self,
        lora_a: Float[Tensor, "experts rank d_in"],
        lora_b: Float[Tensor, "experts d_out rank"],
        scaling: Float[Tensor, " experts"],
        tags: RowTags,
        path: str,
    ) -> None:
        super().__init__()
        # Plain attributes: the optimiser owns the factors as views into one matrix, and the base's state dict stays.
        self.lora_a, self.lora_b, self.scaling = lora_a, lora_b, scaling
        self.tags, self.path = tags, path

    def forward(self, x: Float[Tensor, "batch seq d_in"], output: Float[Tensor, "batch seq d_out"]) -> Tensor:
        """Add each row's own expert to a layer's output.

        Args:
            x: what the layer was given.
            output: what the layer computed.

        Returns:
            The sum, in the dtype of `output`.

        Raises:
            ShapeError: if the layer sees tokens without their rows, as the experts of a mixture do.
        """
        if x.dim() != 3:
            raise ShapeError(
                f"layer '{self.path}' must be given (batch, seq, d_in) to tell whose rows are whose",
                found=tuple(x.shape),
                remedy="leave it out of the target modules",
            )
        lora_a, lora_b, scaling = (self._select(t) for t in (self.lora_a, self.lora_b, self.scaling))
        x = x.to(lora_a.dtype)
        if self.tags.dropout > 0:
            x = x * self._dropout_mask(x)
        num_experts = lora_a.shape[0]
        z = torch.bmm(x.reshape(num_experts, -1, x.shape[-1]), lora_a.mT)  # (experts, tokens, rank)
        z = z * scaling[:, None, None]
        if output.dtype != lora_b.dtype:  # a half-precision base: the experts' update is computed apart
            return output + torch.bmm(z, lora_b.mT).view(output.shape).to(output.dtype)
        return torch.baddbmm(output.reshape(num_experts, -1, output.shape[-1]), z, lora_b.mT).view(output.shape)

    def _select(self, stack: Tensor) -> Tensor:
        return stack if self.tags.experts.numel() == stack.shape[0] else stack[self.tags.experts]

    def _dropout_mask(self, x: Tensor) -> Tensor:
        """A mask that depends on (seed, expert, step, layer) and on neither neighbours nor padding."""
        keep = 1.0 - self.tags.dropout
        mask = torch.ones(x.shape, dtype=x.dtype)
        rows_of_expert = x.shape[0] // len(self.tags.names)
        for position, (name, length) in enumerate(zip(self.tags.names, self.tags.lengths, strict=True)):
            rows = mask[position * rows_of_expert : (position + 1) * rows_of_expert, :length]
            generator = keyed_generator("dropout", *self.tags.key, name, self.path)
            rows.bernoulli_(keep, generator=generator).div_(keep)
        return mask.to(x.device)


def all_experts(num_experts: int, device: torch.device) -> Int[Tensor, " experts"]:
    """Tags of a batch that holds every expert of the stacks."""
    return torch.arange(num_experts, device=device)
