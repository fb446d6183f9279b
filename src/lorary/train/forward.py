"""Rows of many units through the model, and the loss of each unit: with gradients for a step, without for a test."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.data.packing import Group, MicroBatch, micro_batches
from lorary.errors import TrainError
from lorary.model.finite import finite_layers
from lorary.model.logits import can_pack, target_losses
from lorary.model.row_attention import attending_rows
from lorary.train.slots import Unit
from lorary.train.units import LoopSettings, Stack


class Forward:
    """The model seen as losses of units.

    Args:
        model: the base, still bare: how rows may be laid out is found out here.
        stack: parameters of the units, to be seated before the first call.
        settings: how to train.
    """

    def __init__(self, model: Any, stack: Stack, settings: LoopSettings) -> None:
        self.model, self.stack, self.settings = model, stack, settings
        self._packs = can_pack(model)

    def train_losses(self, units: Sequence[Unit]) -> dict[int, float]:
        """Losses of the next step of each unit; their gradients are in the stack afterwards.

        Args:
            units: those in training.

        Returns:
            The loss of each unit by slot, nats per target token.

        Raises:
            TrainError: if a loss is not finite, naming unit and step.
        """
        self.stack.gradient.zero_()
        groups = [group for unit in units for group in unit.train_groups()]
        # Rows that share tokens would share their dropout.
        micros = micro_batches(
            groups, self.settings.max_tokens, share_prefix=self._packs and self.settings.dropout == 0
        )
        draws = {unit.slot: unit.draws for unit in units}
        names = [draws.get(slot, "") for slot in range(self.stack.num_slots)]
        shares = self._shares(groups)
        collected = []
        for micro in micros:
            with attending_rows(self.model, micro.batch):  # activations may be computed anew on the way back
                each, slots = self._run(micro, names, self.settings.dropout)
                # The sum of all losses leaves the gradients of the units apart.
                (each * shares.to(each)[slots]).sum().backward()
            collected.append((each.detach(), slots))
        return _finite("training", units, _means(collected, shares), ahead=1)

    @torch.no_grad()
    def validation_losses(self, units: Sequence[Unit]) -> dict[int, float]:
        """Losses of units over their validation rows; rows of different units share micro-batches.

        Args:
            units: those to evaluate.

        Returns:
            The loss of each unit by slot, nats per target token.

        Raises:
            TrainError: if a loss is not finite, naming unit and step.
            BaseModelError: if a layer gives no numbers although the loss is one.
        """
        groups = [group for unit in units for group in unit.val_groups()]
        micros = micro_batches(groups, self.settings.max_tokens, share_prefix=self._packs)
        with finite_layers(self.model):
            losses = _means([self._run(micro) for micro in micros], self._shares(groups))
            return _finite("validation", units, losses)

    def _run(self, micro: MicroBatch, names: Sequence[str] = (), dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Loss and slot of each target token of a micro-batch."""
        micro = micro.to(self.stack.parameters.device)
        self.stack.tags.set(micro, names, dropout, (self.settings.seed,))
        return target_losses(self.model, micro.batch), micro.target_slots

    def _shares(self, groups: Sequence[Group]) -> Tensor:
        """(slots,) float64: what each target token counts in the mean of its unit; infinite for slots without one."""
        num_targets = torch.zeros(self.stack.num_slots, dtype=torch.float64)
        for group in groups:
            num_targets[group.slot] += sum(len(example.target_ids) for example in group.rows)
        return 1.0 / num_targets


def _means(collected: Sequence[tuple[Tensor, Tensor]], shares: Tensor) -> Tensor:
    """(slots,) mean losses. Copied from the device once, after all work was handed to it."""
    losses, slots = (torch.cat(parts).cpu() for parts in zip(*collected, strict=True))
    return torch.zeros_like(shares).index_add_(0, slots, losses.double() * shares[slots])


def _finite(kind: str, units: Sequence[Unit], losses: Tensor, ahead: int = 0) -> dict[int, float]:
    found: Mapping[int, float] = dict(enumerate(losses.tolist()))
    for unit in units:
        if not math.isfinite(found[unit.slot]):
            raise TrainError(
                f"the {kind} loss of expert '{unit.job.name}' must be finite at step {unit.progress.step + ahead}",
                found=found[unit.slot],
                remedy="look for broken rows in its task, leave it out with --tasks, "
                "or build anew elsewhere with a lower --learning-rate",
            )
    return {unit.slot: found[unit.slot] for unit in units}
