"""The parameters of a Poly or MHR model as one vector: skills beside each layer, and their assignment to tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorary.adapter import LoraFactors
from lorary.errors import TrainError
from lorary.lora.poly import PolyLora
from lorary.train.flat import FlatParameters, uniform
from lorary.train.units import Job, Trained

# Bound of the initial logits: all skills begin almost alike; the small difference tells them apart.
LOGITS_BOUND = 1e-3


def skill_names(num_skills: int) -> tuple[str, ...]:
    """Names of the skills, in the order of their axis."""
    return tuple(f"skill_{number}" for number in range(num_skills))


class PolyStack(FlatParameters):
    """One Poly model in training: the whole of it is one unit, so there is one slot.

    The vector holds the skills' lora_a and lora_b of each layer in turn, then the logits of each layer.

    Args:
        targets: (d_in, d_out) of each adapted layer, by path.
        num_tasks: tasks that learn an assignment.
        num_skills: skills to mix.
        num_splits: blocks of each layer with weights of their own: 1 is Poly, more is MHR.
        rank: rank of each skill and of each mixture.
        scaling: alpha / rank.
        logits_rate: learning rate of the logits as a multiple of that of the skills.
        dtype: as for `FlatParameters`.
        device: likewise.

    Raises:
        ShapeError: if the splits do not cut every layer into equal blocks.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, int]],
        *,
        num_tasks: int,
        num_skills: int,
        num_splits: int,
        rank: int,
        scaling: float,
        logits_rate: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.targets, self.rank, self.scaling = dict(targets), rank, scaling
        self.names, self.num_tasks, self.logits_rate = skill_names(num_skills), num_tasks, logits_rate
        factors = [((num_skills, rank, d_in), (num_skills, d_out, rank)) for d_in, d_out in targets.values()]
        logits = [(num_tasks, num_splits, num_skills)] * len(targets)
        super().__init__(1, [*(shape for pair in factors for shape in pair), *logits], dtype, device)
        self.modules = {
            path: PolyLora(*parts, scaling, self.tags, path) for path, parts in self._by_layer(self.leaves).items()
        }

    def rate_scales(self) -> list[float | None]:
        """The skills learn at the plain rate; the logits at their own, and they are not decayed."""
        num_layers = len(self.targets)
        return [*[None] * 2 * num_layers, *[self.logits_rate] * num_layers]

    def fill(self, slot: int, job: Job, seed: int, init: str, init_scale: float) -> None:
        """Draw every skill's lora_a from U(-s, s) with s = init_scale / sqrt(d_in), and the logits; lora_b is zero.

        Every skill has a draw of its own. From a shared one all skills get almost the same gradient and stay almost
        equal: after 60 steps on eight tasks of the embedded model their mean cosine was 0.98, against 0.64.

        Raises:
            TrainError: if the job does not fit, or asks for a shared draw.
        """
        self._check(job, init)
        layers = self._by_layer(self.tensors(self.parameters))
        for path, (lora_a, lora_b, logits) in layers.items():
            bound = init_scale / self.targets[path][0] ** 0.5
            for skill, name in enumerate(self.names):
                lora_a[skill] = uniform(lora_a.shape[1:], bound, "init", seed, path, name).to(lora_a)
            lora_b.zero_()
            logits.copy_(uniform(logits.shape, LOGITS_BOUND, "logits", seed, path))

    def result(self, slot: int, job: Job, vector: Tensor) -> Trained:
        """The skills as adapters, and the logits (tasks, splits, skills) by path."""
        layers = self._by_layer([view.detach().cpu().clone() for view in self.tensors(vector)])
        adapters = {
            name: {
                path: LoraFactors(lora_a[skill].clone(), lora_b[skill].clone(), self.scaling)
                for path, (lora_a, lora_b, _) in layers.items()
            }
            for skill, name in enumerate(self.names)
        }
        return Trained(adapters, {path: logits for path, (_, _, logits) in layers.items()})

    def _check(self, job: Job, init: str) -> None:
        highest = max([0, *job.train_tasks, *job.val_tasks])
        rules = (
            (job.start is None, "skills that are drawn", "a start", "tune the skills of a library with: lorary adapt"),
            (init == "own", "initial skills that differ", f"init {init}", "--init own"),
            (job.rank == self.rank, f"rank {self.rank}", job.rank, "give all tasks one --rank"),
            (job.alpha / job.rank == self.scaling, f"scaling {self.scaling}", job.alpha / job.rank, "use one --alpha"),
            (job.targets in (None, frozenset(self.targets)), "all layers of the stack", job.targets, "use one target"),
            (highest < self.num_tasks, f"task numbers below {self.num_tasks}", highest, "number the tasks from 0"),
        )
        for holds, need, value, remedy in rules:
            if not holds:
                raise TrainError(f"the model '{job.name}' needs {need}", found=value, remedy=remedy)

    def _by_layer(self, tensors: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """lora_a, lora_b and logits of each layer."""
        factors, logits = tensors[: 2 * len(self.targets)], tensors[2 * len(self.targets) :]
        return dict(zip(self.targets, zip(factors[::2], factors[1::2], logits, strict=True), strict=True))
