"""Training together on a real base model, in float32."""

import pytest
import torch
from torch import Tensor

from lorary.data.builtin.catalogue import builtin_tasks
from lorary.data.template import make_template
from lorary.lora.targets import find_targets, num_layers
from lorary.model.base import load_base
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit


def vector(unit: TrainedUnit) -> Tensor:
    (factors,) = unit.adapters.values()
    return torch.cat([t.flatten() for f in factors.values() for t in (f.lora_a, f.lora_b)])


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_cache")
def test_builtin_tasks_trained_together_on_the_embedded_base_equal_themselves_alone() -> None:
    base = load_base("embedded", dtype="float32", device="cpu")
    template = make_template("plain", base.tokenizer, max_length=256)
    jobs = []
    for name in ("last_word", "capital_city", "sentiment"):
        task = builtin_tasks()[name]
        train, val = ([template.encode(row.source, row.target) for row in task.split(s)[:40]] for s in ("train", "val"))
        jobs.append(Job(name, train, val[:8], num_steps=40, rank=4, alpha=16.0))
    upper = list(range(num_layers(base.model)))[-8:]
    targets = find_targets(base.model, ["q_proj", "k_proj", "v_proj", "o_proj"], upper)
    settings = LoopSettings(OptimiserSettings(3e-3), batch_size=4, num_evals=1)

    def train(queue: list[Job]) -> list[TrainedUnit]:
        units: list[TrainedUnit] = []
        stack = expert_stack(base.model, targets, queue, len(queue))
        train_queue(base.model, queue, stack, settings, on_finish=units.append)
        return units

    for expert, job in zip(train(jobs), jobs, strict=True):
        (alone,) = train([job])
        # Adam amplifies rounding, so that single losses are compared while it has not had the time.
        assert expert.train_losses[:10] == pytest.approx(alone.train_losses[:10], abs=1e-4)
        assert expert.train_losses[-1] < expert.train_losses[0]
        assert expert.val_losses[-1][1] == pytest.approx(alone.val_losses[-1][1], rel=0.01)
        assert (vector(expert) - vector(alone)).norm() < 1e-3 * vector(alone).norm()
        first = max(abs(a - b) for a, b in zip(expert.train_losses[:10], alone.train_losses[:10], strict=True))
        factors = (vector(expert) - vector(alone)).norm() / vector(alone).norm()
        validation = abs(expert.val_losses[-1][1] / alone.val_losses[-1][1] - 1)
        print(f"{expert.name}: ten losses {first:.1e}, factors {factors:.1e}, validation loss {validation:.1e}")
