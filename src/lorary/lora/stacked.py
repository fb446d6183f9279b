"""Training of many units beside one linear layer: stacked factors, spans of tokens tagged with their unit."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorary.data.packing import MicroBatch, Piece
from lorary.errors import ShapeError
from lorary.keys import keyed_generator
from lorary.ops.low_rank import add_low_rank


def _no_tags() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass
class RowTags:
    """Whose the tokens of the running micro-batch are; one object shared by all layers of a model.

    Args:
        slots: unit of each span, a run of tokens of one unit and task.
        tasks: task of each span within its unit.
        lengths: tokens of each span, sequences being read one after another.
        pieces: where each row's own tokens lie.
        names: what the dropout of each slot is keyed by: the unit's name, with its step where units differ in it.
        dropout: probability of dropping an input feature, 0 outside training.
        key: what all dropout is keyed by besides: the seed.
    """

    slots: Int[Tensor, " spans"] = field(default_factory=_no_tags)
    tasks: Int[Tensor, " spans"] = field(default_factory=_no_tags)
    lengths: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    names: Sequence[object] = ()
    dropout: float = 0.0
    key: tuple[object, ...] = ()

    def set(
        self, micro: MicroBatch, names: Sequence[object] = (), dropout: float = 0.0, key: tuple[object, ...] = ()
    ) -> None:
        """Announce the micro-batch that goes through the model next.

        Args:
            micro: on the device of the factors.
            names: by slot, as above; not needed without dropout.
            dropout: as above.
            key: as above.
        """
        self.slots, self.tasks, self.lengths, self.pieces = micro.slots, micro.tasks, micro.lengths, micro.pieces
        self.names, self.dropout, self.key = names, dropout, key

    def dropout_mask(self, x: Float[Tensor, "sequences seq d_in"], path: str) -> Tensor:
        """What to multiply a layer's input by: 0 or 1 / (1 - dropout).

        Each row draws its own mask, keyed by (key, unit, row, layer), so that it depends on neither layout nor
        company.

        Args:
            x: what the layer was given.
            path: path of the layer.

        Returns:
            The mask, as `x`.
        """
        keep = 1.0 - self.dropout
        mask = torch.ones(x.shape, dtype=x.dtype)
        for piece in self.pieces:
            generator = keyed_generator("dropout", *self.key, self.names[piece.slot], piece.name, path)
            mask[piece.sequence, piece.start : piece.stop].bernoulli_(keep, generator=generator)
        return mask.div_(keep).to(x.device)

    def admit(self, x: Tensor, dtype: torch.dtype, path: str) -> Tensor:
        """What the units of a layer see of its input: all of it, or what dropout leaves.

        Args:
            x: what the layer was given, (sequences, seq, d_in).
            dtype: of the factors, which dropout works in.
            path: path of the layer.

        Raises:
            ShapeError: if the layer sees tokens without their sequences, as the experts of a mixture do.
        """
        if x.dim() != 3:
            raise ShapeError(
                f"layer '{path}' must be given (batch, seq, d_in) to tell whose rows are whose",
                found=tuple(x.shape),
                remedy="leave it out of the target modules",
            )
        if self.dropout == 0:
            return x
        x = x.to(dtype)  # before the mask, whose 1 / (1 - dropout) half precision would bend
        return x * self.dropout_mask(x, path)


class TrainedLora(nn.Module):
    """Factors in training beside one linear layer; each token of a batch meets those of its own unit or task.

    What is trained is a plain attribute: the optimiser owns it as a view into one vector, and the state dict of the
    base stays the base's.

    Args:
        tags: shared by all layers, set before each forward pass.
        path: path of the layer, part of the key of its dropout.
        dtype: of the factors.
    """

    def __init__(self, tags: RowTags, path: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.tags, self.path, self.dtype = tags, path, dtype

    def forward(self, x: Float[Tensor, "sequences seq d_in"], output: Float[Tensor, "sequences seq d_out"]) -> Tensor:
        """Add to a layer's output what the factors of each token compute.

        Args:
            x: what the layer was given.
            output: what the layer computed.

        Returns:
            The sum, in the dtype of `output`.

        Raises:
            ShapeError: if the layer sees tokens without their sequences, as the experts of a mixture do.
        """
        if torch.is_autocast_enabled(x.device.type):  # the factors would be rounded to half precision
            with torch.autocast(x.device.type, enabled=False):
                return self._added(x, output)
        return self._added(x, output)

    def _added(self, x: Tensor, output: Tensor) -> Tensor:
        return self.add(self.tags.admit(x, self.dtype, self.path), output)

    def add(self, x: Tensor, output: Tensor) -> Tensor:
        """The same, of what dropout leaves of the input."""
        return add_low_rank(output, x, *self.of_spans(), self.tags.lengths)

    def of_spans(self) -> tuple[Float[Tensor, "spans rank d_in"], Float[Tensor, "spans rank d_out"]]:
        """lora_a, and lora_b transposed and scaled, of each span of tokens."""
        raise NotImplementedError


class StackedLora(TrainedLora):
    """LoRA factors of many units; each token of a batch meets the factors of its own unit.

    Nothing of one unit reaches another: tokens only multiply their own factors, so that the gradient of the summed
    losses is, unit by unit, what training it alone would give. The rank axis is the largest of the stack; a
    smaller unit has zero rows and columns there, whose gradients are zero, so that they stay zero.

    Args:
        lora_a: leaf tensor that requires a gradient.
        lora_b: leaf tensor that requires a gradient.
        scaling: alpha / rank of each unit.
        tags: as for `TrainedLora`.
        path: likewise.
    """

    def __init__(
        self,
        lora_a: Float[Tensor, "slots rank d_in"],
        lora_b: Float[Tensor, "slots d_out rank"],
        scaling: Float[Tensor, " slots"],
        tags: RowTags,
        path: str,
    ) -> None:
        super().__init__(tags, path, lora_a.dtype)
        self.lora_a, self.lora_b, self.scaling = lora_a, lora_b, scaling

    def of_spans(self) -> tuple[Tensor, Tensor]:
        """As above."""
        slots = self.tags.slots
        up = self.lora_b.mT.index_select(0, slots) * self.scaling[slots, None, None]
        return self.lora_a.index_select(0, slots), up
