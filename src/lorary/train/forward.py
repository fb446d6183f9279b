"""Rows of many units through the model, and the loss of each unit: with gradients for a step, without for a test."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lorary.data.packing import Group, MicroBatch, micro_batches
from lorary.errors import TrainError
from lorary.model.finite import finite_layers
from lorary.model.logits import can_pack, target_losses
from lorary.model.row_attention import attending_rows
from lorary.ops.memory import is_out_of_memory
from lorary.train.flat import FlatParameters
from lorary.train.slots import Slot
from lorary.train.units import LoopSettings


class DoesNotFit(Exception):
    """A micro-batch needs more memory than there is. The units are as they were before.

    Args:
        tokens: of the micro-batch, padding counted.
        num_rows: of the micro-batch.
        reason: what the device said.
    """

    def __init__(self, tokens: int, num_rows: int, reason: str) -> None:
        super().__init__(reason)
        self.tokens, self.num_rows, self.reason = tokens, num_rows, reason


class Forward:
    """The model seen as losses of units.

    Args:
        model: the base, still bare: how rows may be laid out is found out here.
        stack: parameters of the units, to be seated before the first call.
        settings: how to train.
    """

    def __init__(self, model: Any, stack: FlatParameters, settings: LoopSettings) -> None:
        self.model, self.stack, self.settings = model, stack, settings
        self._packs = can_pack(model)

    def train_losses(self, slots: Sequence[Slot], max_tokens: int) -> dict[int, float]:
        """Losses of the next step of each unit; their gradients are in the stack afterwards.

        Args:
            slots: those in training.
            max_tokens: of a micro-batch.

        Returns:
            The loss of each unit by slot, nats per target token.

        Raises:
            TrainError: if a loss is not finite, naming unit and step.
            DoesNotFit: if memory runs out.
        """
        groups = [group for slot in slots for group in slot.train_groups()]
        draws = {slot.index: slot.draws for slot in slots}
        names = [draws.get(index, "") for index in range(self.stack.num_slots)]
        shares = self._shares(groups)
        return _finite("training", slots, _means(self._descend(groups, names, shares, max_tokens), shares), ahead=1)

    def try_out(self, groups: Sequence[Group], max_tokens: int) -> None:
        """Compute the gradients of some rows and forget them: nothing is changed, and no draw is used up.

        Args:
            groups: the rows.
            max_tokens: of a micro-batch.

        Raises:
            DoesNotFit: if memory runs out.
        """
        self._descend(groups, [""] * self.stack.num_slots, self._shares(groups), max_tokens)
        self.stack.clear_gradient()

    def _descend(
        self, groups: Sequence[Group], names: Sequence[str], shares: Tensor, max_tokens: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Loss and slot of each target token by micro-batch; the gradients of the mean losses go to the stack."""
        self.stack.clear_gradient()
        # Rows that share tokens would share their dropout.
        micros = micro_batches(groups, max_tokens, share_prefix=self._packs and self.settings.dropout == 0)
        collected = []
        for micro in micros:
            # Activations may be computed anew on the way back, which is to attend alike.
            with _fitting(micro), attending_rows(self.model, micro.batch):
                losses, indices = self._run(micro, names, self.settings.dropout)
                # The sum of all losses leaves the gradients of the units apart.
                (losses * shares.to(losses)[indices]).sum().backward()
            collected.append((losses.detach(), indices))
        return collected

    @torch.no_grad()
    def validation_losses(self, slots: Sequence[Slot], max_tokens: int) -> dict[int, float]:
        """Losses of units over their validation rows; rows of different units share micro-batches.

        Args:
            slots: those to evaluate.
            max_tokens: of a micro-batch.

        Returns:
            The loss of each unit by slot, nats per target token.

        Raises:
            TrainError: if a loss is not finite, naming unit and step.
            BaseModelError: if the output of a layer is not finite although the loss is.
            DoesNotFit: if memory runs out.
        """
        groups = [group for slot in slots for group in slot.val_groups()]
        collected = []
        with finite_layers(self.model):
            for micro in micro_batches(groups, max_tokens, share_prefix=self._packs):
                with _fitting(micro):
                    collected.append(self._run(micro))
            return _finite("validation", slots, _means(collected, self._shares(groups)))

    def _run(self, micro: MicroBatch, names: Sequence[str] = (), dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """Loss and slot of each target token of a micro-batch."""
        micro = micro.to(self.stack.parameters.device)
        self.stack.tags.set(micro, names, dropout, (self.settings.seed,))
        with narrowed(micro.slots.device, self.settings.autocast):
            return target_losses(self.model, micro.batch), micro.target_slots

    def _shares(self, groups: Sequence[Group]) -> Tensor:
        """(slots,) float64: what each target token counts in the mean of its unit; infinite for slots without one."""
        num_targets = torch.zeros(self.stack.num_slots, dtype=torch.float64)
        for group in groups:
            num_targets[group.slot] += sum(len(example.target_ids) for example in group.rows)
        return 1.0 / num_targets


def narrowed(device: torch.device, autocast: bool) -> AbstractContextManager[Any]:
    """Where the base multiplies in bfloat16, if it is to.

    Args:
        device: where it computes.
        autocast: as in `LoopSettings`.
    """
    return torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()


@contextmanager
def _fitting(micro: MicroBatch) -> Iterator[None]:
    """Say of which micro-batch memory ran out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DoesNotFit(micro.batch.input_ids.numel(), len(micro.pieces), reason) from error


def _means(collected: Sequence[tuple[Tensor, Tensor]], shares: Tensor) -> Tensor:
    """(slots,) mean losses. Copied from the device once, after all work was handed to it."""
    losses, slots = (torch.cat(parts).cpu() for parts in zip(*collected, strict=True))
    return torch.zeros_like(shares).index_add_(0, slots, losses.double() * shares[slots])


def _finite(kind: str, slots: Sequence[Slot], losses: Tensor, ahead: int = 0) -> dict[int, float]:
    by_slot = {slot.index: float(losses[slot.index]) for slot in slots}
    for slot in slots:
        if not math.isfinite(by_slot[slot.index]):
            raise TrainError(
                f"the {kind} loss of expert '{slot.job.name}' must be finite at step {slot.progress.step + ahead}",
                found=by_slot[slot.index],
                remedy="look for broken rows in its task, leave it out with --tasks, "
                "or build anew elsewhere with a lower --learning-rate",
            )
    return by_slot
