"""Gates that tell rows apart: decided for a request, the same for all tokens, and one setting per row."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorary.errors import RouterError, UsageError
from lorary.lora.context import PerThread
from lorary.lora.gate import LayerInput
from lorary.model.decision import Request
from lorary.model.gates import ScoreGate
from lorary.model.seated import Seated
from lorary.ops.choose import Chosen


class RequestGate(nn.Module):
    """Experts that were decided for each row before the pass began; while it is probed, a source of scores.

    Args:
        requests: of each thread; shared by all layers of the setting.
        seated: which experts sit in the layer.
        probed: the scores of this layer, where they take part in the decision.
    """

    quick = None

    def __init__(self, requests: PerThread[Request], seated: Seated, probed: ScoreGate | None) -> None:
        super().__init__()
        self.requests, self.seated, self.probed = requests, seated, probed

    @property
    def request(self) -> Request:
        """Of the thread that runs."""
        return self.requests.here

    @property
    def decided(self) -> object:
        """What the running thread's request decided; None while it is probed."""
        return self.request.settled

    @property
    def is_probing(self) -> bool:
        """Whether the pass that runs is the probe."""
        return self.request.is_probing

    @property
    def most(self) -> int:
        """Experts of a token at most."""
        return self.request.most

    @property
    def reads_prototypes(self) -> bool:
        """Whether the probe runs, for a rule that reads them."""
        return self.is_probing and self.probed is not None and self.probed.reads_prototypes

    @property
    def reads_z(self) -> bool:
        """Whether the probe runs, for a rule that reads the down-projections."""
        return self.is_probing and self.probed is not None and self.probed.reads_z

    def forward(self, inputs: LayerInput) -> Chosen | None:
        """The experts of each token's row; None while it is probed, for the probe is of the bare base."""
        batch, seq = rows_of(inputs)
        if self.is_probing:
            if self.probed is not None:
                scores = self.probed.scores(inputs).view(batch, seq, -1)
                self.request.add(self.seated.experts, scores, self.probed.alive)
            return None
        return self.request.decided(batch).tokens(self.seated, inputs.x, seq)


class FixedGate(nn.Module):
    """The same weights for every token.

    Args:
        weights: (experts,), on the CPU: a gate is moved when it is made.
    """

    reads_prototypes = reads_z = False
    quick = decided = None

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("experts", weights.nonzero().squeeze(1), persistent=False)
        self.register_buffer("weights", weights[self.experts], persistent=False)

    experts: Tensor
    weights: Tensor

    @property
    def most(self) -> int:
        """How many have a weight."""
        return len(self.experts)

    def forward(self, inputs: LayerInput) -> Chosen:
        """The experts, once for each token."""
        num_tokens = inputs.x.shape[0]
        return Chosen(self.experts.expand(num_tokens, -1), self.weights.expand(num_tokens, -1))


class RowGate(nn.Module):
    """Each row of the batch by the gate of its own setting.

    A batch may have a multiple of the rows that were set: generation repeats each row for its beams, in place.

    Args:
        gates: one for each different setting.
        of_row: the gate of each row.
    """

    quick = decided = None

    gate_of_row: Tensor
    fixed_experts: Tensor
    fixed_weights: Tensor

    def __init__(self, gates: Sequence[nn.Module], of_row: Sequence[int]) -> None:
        super().__init__()
        self.gates, self.of_row = nn.ModuleList(gates), tuple(of_row)
        self.most = max(int(gate.most) for gate in gates)  # type: ignore[arg-type]
        # Where the rows are: kept on the device, since to find them there would make the host wait.
        self.register_buffer("gate_of_row", torch.tensor(self.of_row), persistent=False)
        # Fixed weights are looked up for all rows at once: a library's experts, each alone, are as many gates.
        fixed = {number: gate for number, gate in enumerate(gates) if isinstance(gate, FixedGate)}
        self.deciding = [number for number in range(len(gates)) if number not in fixed]
        for number in self.deciding:
            places = [row for row, own in enumerate(self.of_row) if own == number]
            self.register_buffer(f"rows_{number}", torch.tensor(places), persistent=False)
        dtype = next((gate.weights.dtype for gate in fixed.values()), None)
        experts = torch.zeros(len(gates), self.most, dtype=torch.int64)
        weights = torch.zeros(len(gates), self.most, dtype=dtype)
        for number, gate in fixed.items():
            experts[number, : gate.most] = gate.experts
            weights[number, : gate.most] = gate.weights
        self.register_buffer("fixed_experts", experts, persistent=False)
        self.register_buffer("fixed_weights", weights, persistent=False)

    @property
    def reads_prototypes(self) -> bool:
        """Whether any row's gate does."""
        return any(bool(self.gates[number].reads_prototypes) for number in self.deciding)

    @property
    def reads_z(self) -> bool:
        """Whether any row's gate does."""
        return any(bool(self.gates[number].reads_z) for number in self.deciding)

    def forward(self, inputs: LayerInput) -> Chosen | None:
        """The experts of each token; None while rows are probed."""
        batch, _ = rows_of(inputs)
        num_beams = beams_of(self.of_row, batch)
        of_row = self.gate_of_row.repeat_interleave(num_beams)
        probing = any(getattr(self.gates[number], "is_probing", False) for number in self.deciding)
        numbers = [n for n in self.deciding if not probing or getattr(self.gates[n], "is_probing", False)]
        parts = [(self.gates[number], _expanded(getattr(self, f"rows_{number}"), num_beams)) for number in numbers]
        fixed = Chosen(self.fixed_experts[of_row], self.fixed_weights[of_row].to(inputs.x.dtype))
        chosen = chosen_by_row(inputs, fixed, parts)
        return None if probing else chosen


def chosen_by_row(inputs: LayerInput, fixed: Chosen, parts: Sequence[tuple[nn.Module, Tensor]]) -> Chosen:
    """The experts of each token, where some rows have fixed ones and others are decided.

    Args:
        inputs: of the layer.
        fixed: one for each row, as wide as the widest choice; weights of 0 in rows that are decided.
        parts: gates, each with the rows that it decides for; one that leaves them as they are gives None.
    """
    batch, seq = rows_of(inputs)
    experts, weights = (part[:, None].repeat(1, seq, 1) for part in fixed)
    for gate, rows in parts:
        chosen = gate(_rows_only(inputs, rows, batch))
        if chosen is not None:
            width = chosen.experts.shape[1]
            experts[rows, :, :width] = chosen.experts.view(len(rows), seq, width)
            weights[rows, :, :width] = chosen.weights.to(weights).view(len(rows), seq, width)
    return Chosen(experts.flatten(0, 1), weights.flatten(0, 1))


def spread(of_row: Sequence[int], batch: int) -> list[int]:
    """What was given row by row, repeated in place for the rows of a batch.

    Raises:
        UsageError: if the batch is no multiple of the rows given.
    """
    num_beams = beams_of(of_row, batch)
    return [number for number in of_row for _ in range(num_beams)]


def beams_of(of_row: Sequence[int], batch: int) -> int:
    """How often each row that was given occurs in a batch.

    Raises:
        UsageError: if the batch is no multiple of the rows given.
    """
    if batch % len(of_row):
        raise UsageError(
            "a batch must have one row for each routing setting, or the same number of beams for each",
            found=f"{len(of_row)} settings for {batch} rows",
            remedy="give one setting per row, or one for all without a list",
        )
    return batch // len(of_row)


def _expanded(rows: Tensor, num_beams: int) -> Tensor:
    """Where the beams of some rows are in a batch."""
    return (rows[:, None] * num_beams + torch.arange(num_beams, device=rows.device)).flatten()


def rows_of(inputs: LayerInput) -> tuple[int, int]:
    """(batch, seq) of what a layer was given.

    Raises:
        RouterError: if rows cannot be told apart, as in the experts of a mixture.
    """
    if len(inputs.leading) != 2:
        raise RouterError(
            "a decision for a row needs layers that are given (batch, seq, d_in)",
            found=f"{(*inputs.leading, inputs.x.shape[-1])}",
            remedy="route every layer for itself: per='layer', one setting for the batch",
        )
    return inputs.leading[0], inputs.leading[1]


def _rows_only(inputs: LayerInput, rows: Tensor, batch: int) -> LayerInput:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.view(batch, -1, tensor.shape[-1])[rows].flatten(0, 1)

    x = pick(inputs.x)
    assert x is not None
    return LayerInput(x, pick(inputs.z), pick(inputs.projections), torch.Size((len(rows), *inputs.leading[1:])))
