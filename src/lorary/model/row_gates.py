"""Gates that tell rows apart: decided for a request, the same for all tokens, and one setting per row."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorary.errors import RouterError, UsageError
from lorary.lora.gated import Seen
from lorary.model.decision import Request
from lorary.model.gates import ScoreGate


class RequestGate(nn.Module):
    """Weights that were decided for each row before the pass began; while it is probed, a source of scores.

    Args:
        request: shared by all layers of the setting.
        experts: of the layer, as positions in the order of names.
        probed: the scores of this layer; None where no layer has a say.
    """

    def __init__(self, request: Request, experts: Sequence[int], probed: ScoreGate | None) -> None:
        super().__init__()
        self.request, self.probed = request, probed
        self.register_buffer("experts", torch.tensor(list(experts)), persistent=False)

    experts: Tensor

    @property
    def is_probing(self) -> bool:
        """Whether the pass that runs is the probe."""
        return self.request.is_probing

    @property
    def reads_prototypes(self) -> bool:
        """Whether the probe runs, for a rule that reads them."""
        return self.is_probing and self.probed is not None and self.probed.reads_prototypes

    def forward(self, seen: Seen) -> Tensor | None:
        """The weights of each token's row; None while it is probed, for the probe is of the bare base."""
        batch, seq = rows_of(seen)
        if self.is_probing:
            if self.probed is not None:
                self.request.add(self.experts, self.probed.scores(seen).view(batch, seq, -1), self.probed.alive)
            return None
        return self.request.read(self.experts, seen.x, batch).repeat_interleave(seq, dim=0)


class FixedGate(nn.Module):
    """The same weights for every token.

    Args:
        weights: (experts,).
    """

    reads_prototypes = False

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)

    weights: Tensor

    def forward(self, seen: Seen) -> Tensor:
        """The weights, once for each token."""
        return self.weights.expand(seen.z.shape[0], -1)


class RowGate(nn.Module):
    """Each row of the batch by the gate of its own setting.

    A batch may have a multiple of the rows that were set: generation repeats each row for its beams, in place.

    Args:
        gates: one for each different setting.
        of_row: the gate of each row.
        num_experts: of the layer.
    """

    def __init__(self, gates: Sequence[nn.Module], of_row: Sequence[int], num_experts: int) -> None:
        super().__init__()
        self.gates, self.of_row, self.num_experts = nn.ModuleList(gates), tuple(of_row), num_experts

    @property
    def reads_prototypes(self) -> bool:
        """Whether any row's gate does."""
        return any(bool(gate.reads_prototypes) for gate in self.gates)

    def forward(self, seen: Seen) -> Tensor | None:
        """Routing weights of each token; None while rows are probed."""
        batch, seq = rows_of(seen)
        of_row = torch.tensor(spread(self.of_row, batch), device=seen.x.device)
        probing = any(getattr(gate, "is_probing", False) for gate in self.gates)
        weights = seen.z.new_zeros(batch, seq, self.num_experts)
        for number, gate in enumerate(self.gates):
            if probing and not getattr(gate, "is_probing", False):
                continue
            rows = (of_row == number).nonzero().squeeze(1)
            own = gate(_rows_only(seen, rows, batch))
            if own is not None:
                weights = weights.index_copy(0, rows, own.to(weights).view(len(rows), seq, -1))
        return None if probing else weights.flatten(0, 1)


def spread(of_row: Sequence[int], batch: int) -> list[int]:
    """What was given row by row, repeated in place for the rows of a batch.

    Raises:
        UsageError: if the batch is no multiple of the rows given.
    """
    if batch % len(of_row):
        raise UsageError(
            "a batch must have one row for each routing setting, or the same number of beams for each",
            found=f"{len(of_row)} settings for {batch} rows",
            remedy="give one setting per row, or one for all without a list",
        )
    return [number for number in of_row for _ in range(batch // len(of_row))]


def rows_of(seen: Seen) -> tuple[int, int]:
    """(batch, seq) of what a layer was given.

    Raises:
        RouterError: if rows cannot be told apart, as in the experts of a mixture.
    """
    if len(seen.leading) != 2:
        raise RouterError(
            "a decision for a row needs layers that are given (batch, seq, d_in)",
            found=f"{(*seen.leading, seen.x.shape[-1])}",
            remedy="route every layer for itself: per='layer', one setting for the batch",
        )
    return seen.leading[0], seen.leading[1]


def _rows_only(seen: Seen, rows: Tensor, batch: int) -> Seen:
    def pick(tensor: Tensor) -> Tensor:
        return tensor.view(batch, -1, tensor.shape[-1])[rows].flatten(0, 1)

    projections = None if seen.projections is None else pick(seen.projections)
    return Seen(pick(seen.x), pick(seen.z), projections, torch.Size((len(rows), *seen.leading[1:])))
