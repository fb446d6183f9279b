"""The parameters of many experts as one vector, with a view per layer and factor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import TrainError
from lorary.lora.stacked import StackedLora
from lorary.train.flat import FlatParameters, uniform
from lorary.train.units import Job, Trained


class ExpertStack(FlatParameters):
    """Slots for experts in training: lora_a and lora_b of each layer in turn.

    An expert of a smaller rank than the stack, or of fewer layers, has zeros elsewhere: both factors are zero there,
    so that both gradients are, and neither the norm nor AdamW ever sees them.

    Args:
        num_slots: experts that can be in training at once.
        targets: (d_in, d_out) of each adapted layer, by path.
        rank: the largest rank of an expert.
        dtype: as for `FlatParameters`.
        device: likewise.
    """

    def __init__(
        self,
        num_slots: int,
        targets: Mapping[str, tuple[int, int]],
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.targets, self.rank = dict(targets), rank
        pairs = (((num_slots, rank, d_in), (num_slots, d_out, rank)) for d_in, d_out in targets.values())
        super().__init__(num_slots, [shape for pair in pairs for shape in pair], dtype, device)
        self.scaling = torch.ones(num_slots, dtype=dtype, device=device)
        self.modules = {
            path: StackedLora(lora_a, lora_b, self.scaling, self.tags, path)
            for path, lora_a, lora_b in zip(self.targets, self.leaves[::2], self.leaves[1::2], strict=True)
        }

    def fill(self, slot: int, job: Job, seed: int, init: str, init_scale: float) -> None:
        """Draw lora_a from U(-s, s) with s = init_scale / sqrt(d_in), as PEFT does for 1; all else is zero.

        Where a job has a start, its factors take the first ranks of their layers. The ranks behind them are drawn as
        ever and their lora_b is zero, so that the slot computes what the start does, and has room to learn more.

        Raises:
            TrainError: if the expert's rank or layers do not fit the stack, or its start does not fit the expert.
        """
        self._check_fits(job)
        self.parameters.view(self.num_slots, -1)[slot].zero_()
        self.scaling[slot] = job.alpha / job.rank
        for path, (lora_a, _) in self._layers(job, self.parameters).items():
            key = ("init", seed, path) if init == "shared" else ("init", seed, path, job.name)
            shape = (job.rank, lora_a.shape[-1])
            lora_a[slot, : job.rank] = uniform(shape, init_scale / shape[1] ** 0.5, *key).to(lora_a)
        self._begin(slot, job)

    def _begin(self, slot: int, job: Job) -> None:
        """Put the start of a job in place; where its scaling is another one, lora_b makes up for it."""
        layers = self._layers(job, self.parameters)
        for path, factors in (job.start or {}).items():
            lora_a, lora_b = (factor[slot] for factor in layers[path])
            lora_a[: factors.rank] = factors.lora_a.to(lora_a)
            lora_b[:, : factors.rank] = factors.lora_b.to(lora_b) * (factors.scaling / (job.alpha / job.rank))

    def result(self, slot: int, job: Job, vector: Tensor) -> Trained:
        """The factors of the expert in a slot, whose job says rank, alpha and layers."""
        factors = {
            path: LoraFactors(_copy(a[slot, : job.rank]), _copy(b[slot, :, : job.rank]), job.alpha / job.rank)
            for path, (a, b) in self._layers(job, vector).items()
        }
        return Trained({job.name: factors})

    def _check_fits(self, job: Job) -> None:
        unknown = sorted((job.targets or frozenset()) - self.targets.keys())
        if job.rank > self.rank or unknown:
            raise TrainError(
                f"expert '{job.name}' must fit a stack of rank {self.rank} over {len(self.targets)} layers",
                found=f"rank {job.rank}" + (f", layer '{unknown[0]}' not among them" if unknown else ""),
                remedy="make the stack for all jobs of the queue",
            )
        layers = self.targets if job.targets is None else {path: self.targets[path] for path in job.targets}
        for path, factors in (job.start or {}).items():
            if factors.rank > job.rank or layers.get(path) != (factors.d_in, factors.d_out):
                raise TrainError(
                    f"the start of expert '{job.name}' must fit its rank {job.rank} and its {len(layers)} layers",
                    found=f"layer '{path}' of rank {factors.rank}, d_in {factors.d_in} and d_out {factors.d_out}",
                    remedy="start from an adapter of this base, or truncate it with --rank",
                )

    def _layers(self, job: Job, vector: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """lora_a and lora_b, with all slots, of the layers that a job adapts."""
        views = self.tensors(vector)
        pairs = zip(self.targets, views[::2], views[1::2], strict=True)
        return {path: (a, b) for path, a, b in pairs if job.targets is None or path in job.targets}


def expert_stack(
    model: Any, targets: Mapping[str, tuple[int, int]], jobs: Sequence[Job], num_slots: int
) -> ExpertStack:
    """The stack that a queue of experts needs.

    Args:
        model: the base model, for dtype and device.
        targets: (d_in, d_out) of every layer that any of the jobs adapts, by path.
        jobs: at least one.
        num_slots: most experts in training at once.

    Returns:
        A stack of the largest rank, with no more slots than jobs.
    """
    parameter = next(model.parameters())
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    rank = max(job.rank for job in jobs)
    return ExpertStack(min(num_slots, len(jobs)), targets, rank, dtype, parameter.device)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
