"""PHATGOOSE's gates: one vector for each layer of an expert, trained while base and expert stay as they are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate, input_length, plan_batches
from lorary.data.template import Example
from lorary.errors import TrainError
from lorary.lora.gate import LayerInput
from lorary.model.logits import target_losses
from lorary.model.one_expert import alone
from lorary.ops.choose import Chosen
from lorary.prepare.measure import MeasureContext, Tensors
from lorary.prepare.settings import GateSettings
from lorary.train.optimiser import OptimiserSettings, SlotwiseAdamW


def expert_gates(context: MeasureContext, name: str, examples: Sequence[Example]) -> tuple[Tensors, dict[str, Any]]:
    """The gates of an expert of the library."""
    gates, losses = train_gates(context.base.model, context.library.get(name), examples, context.settings.gates)
    return gates, {"losses": losses}


def train_gates(
    model: Any, adapter: Adapter, examples: Sequence[Example], settings: GateSettings
) -> tuple[dict[str, Tensor], list[float]]:
    """Train the gates of one expert on its own data.

    In each layer the expert acts with weight `sigmoid(g · x)`. Gates begin at zero, and all layers learn together.
    Source: PHATGOOSE, arXiv 2402.05859.

    Args:
        model: the bare base model, in eval mode, its parameters frozen.
        adapter: the expert.
        examples: rows of its own data, at least one.
        settings: how to train.

    Returns:
        (d_in,) for each layer, in the dtype of the experts; and the loss of each step, nats per target token.

    Raises:
        TrainError: if a loss is not finite.
    """
    lengths = [input_length(example) for example in examples]
    plan = plan_batches(lengths, settings.batch_size, settings.steps, "gates", settings.seed, adapter.name)
    with alone(model, adapter) as loras:
        sizes = {path: lora.down.shape[1] for path, lora in loras.items()}
        first = next(iter(loras.values()))
        vector = torch.zeros(sum(sizes.values()), dtype=first.up.dtype, device=first.up.device, requires_grad=True)
        for path, part in _parts(sizes).items():
            loras[path].route_by(_SigmoidGate(vector, part), "outputs")
        losses = _descend(model, vector, [[examples[i] for i in rows] for rows in plan], settings, adapter.name)
    gates = vector.detach()
    return {path: gates[part].clone() for path, part in _parts(sizes).items()}, losses


def _descend(
    model: Any, vector: Tensor, batches: Sequence[Sequence[Example]], settings: GateSettings, name: str
) -> list[float]:
    gradient = vector.grad = torch.zeros_like(vector)
    # A gate has few numbers: nothing is decayed, and its gradient is cut at the usual length.
    optimiser = SlotwiseAdamW(
        vector.detach(), gradient, 1, OptimiserSettings(settings.learning_rate, warmup=0.1, clip=1.0)
    )
    losses = []
    for step, rows in enumerate(batches):
        gradient.zero_()
        loss = target_losses(model, collate(rows).to(model.device)).mean()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise TrainError(
                f"the loss of the gates of expert '{name}' must be finite at step {step}",
                found=losses[-1],
                remedy="look for broken rows in its task, or lower --learning-rate",
            )
        loss.backward()
        optimiser.step(0, step, settings.steps)
    return losses


def _parts(sizes: Mapping[str, int]) -> dict[str, slice]:
    """Where the gate of each layer lies in one vector."""
    parts, start = {}, 0
    for path, size in sizes.items():
        parts[path] = slice(start, start + size)
        start += size
    return parts


class _SigmoidGate:
    """A gate that weighs its one expert by `sigmoid(g · x)`.

    Args:
        vector: the gates of all layers.
        part: where the gate of this layer lies.
    """

    # The down-projections are not read, but asked for: the kernel without them has no gradients.
    reads_prototypes, reads_z, most, quick, decided = False, True, 1, None, None

    def __init__(self, vector: Tensor, part: slice) -> None:
        self._vector, self._part = vector, part

    def __call__(self, inputs: LayerInput) -> Chosen:
        weights = torch.sigmoid(inputs.x @ self._vector[self._part].to(inputs.x))[:, None]
        return Chosen(torch.zeros_like(weights, dtype=torch.int64), weights)
