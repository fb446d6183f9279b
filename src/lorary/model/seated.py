"""Where the experts of a library sit in a layer, and what was decided for rows as layers seat it."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from lorary.ops.choose import Chosen


class Seated(nn.Module):
    """Which experts sit in a layer, both ways.

    Args:
        experts: of the layer, as positions in the order of names.
        num_experts: of the library.
    """

    experts: Tensor
    seats: Tensor

    def __init__(self, experts: Sequence[int], num_experts: int) -> None:
        super().__init__()
        self.order = tuple(experts)
        positions = torch.tensor(self.order)
        self.register_buffer("experts", positions, persistent=False)
        seats = torch.full((num_experts,), -1).scatter(0, positions, torch.arange(len(positions)))
        self.register_buffer("seats", seats, persistent=False)


class SeatedChoice:
    """The experts of each row, token by token as a layer seats them: worked out once for layers that agree.

    A decision for a whole request is the same in all its tokens. What a layer makes of it takes longer than the
    layer's own products where one token is decoded. Only the length of the last pass is kept.

    Args:
        chosen: for each row, by positions in the order of names.
    """

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self._length = 0
        self._by_layer: dict[Hashable, Chosen] = {}

    def tokens(self, seated: Seated, x: Tensor, seq: int, width: int | None = None) -> Chosen:
        """The experts of each token of one layer.

        Args:
            seated: of the layer.
            x: what it was given, for dtype and device.
            seq: tokens of each row.
            width: experts of a token, at least those of a row; as many where None.
        """
        if torch.compiler.is_compiling():  # compiled code holds what it computes
            return self._work_out(seated, x, seq, width)
        if seq != self._length:
            self._length, self._by_layer = seq, {}
        key = (seated.order, width, x.dtype, x.device)
        if key not in self._by_layer:
            made = self._work_out(seated, x, seq, width)
            if made.weights.requires_grad:  # each backward pass frees what leads to it
                return made
            self._by_layer[key] = made
        return self._by_layer[key]

    def _work_out(self, seated: Seated, x: Tensor, seq: int, width: int | None) -> Chosen:
        chosen = self.chosen.like(x).among(seated.seats)
        missing = 0 if width is None else width - chosen.experts.shape[1]
        return Chosen(*(nn.functional.pad(part, (0, missing)).repeat_interleave(seq, dim=0) for part in chosen))
