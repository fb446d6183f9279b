"""Training together on a real base model, in float32."""

import pytest
import torch
from torch import Tensor

from lorary.data.builtin.catalogue import builtin_tasks
from lorary.data.template import make_template
from lorary.lora.targets import find_targets, num_layers
from lorary.model.base import load_base
from lorary.train.loop import ExpertData, LoopSettings, TrainedExpert, train_window
from lorary.train.optimiser import OptimiserSettings


def vector(expert: TrainedExpert) -> Tensor:
    return torch.cat([t.flatten() for f in expert.modules.values() for t in (f.lora_a, f.lora_b)])


@pytest.mark.slow
@pytest.mark.usefixtures("embedded_cache")
def test_builtin_tasks_trained_together_on_the_embedded_base_equal_themselves_alone() -> None:
    base = load_base("embedded", dtype="float32", device="cpu")
    template = make_template("plain", base.tokenizer, max_length=256)
    experts = []
    for name in ("last_word", "capital_city", "sentiment"):
        task = builtin_tasks()[name]
        train, val = ([template.encode(row.source, row.target) for row in task.split(s)[:40]] for s in ("train", "val"))
        experts.append(ExpertData(name, train, val[:8]))
    upper = list(range(num_layers(base.model)))[-8:]
    targets = find_targets(base.model, ["q_proj", "k_proj", "v_proj", "o_proj"], upper)
    settings = LoopSettings(OptimiserSettings(3e-3, 40), batch_size=4, rank=4, alpha=16.0, num_evals=1)
    together = train_window(base.model, experts, targets, settings)
    for expert, data in zip(together, experts, strict=True):
        (alone,) = train_window(base.model, [data], targets, settings)
        # Adam amplifies rounding, so that single losses are compared while it has not had the time.
        assert expert.train_losses[:10] == pytest.approx(alone.train_losses[:10], abs=1e-4)
        assert expert.train_losses[-1] < expert.train_losses[0]
        assert expert.val_losses[-1][1] == pytest.approx(alone.val_losses[-1][1], rel=0.01)
        assert (vector(expert) - vector(alone)).norm() < 1e-3 * vector(alone).norm()
        first = max(abs(a - b) for a, b in zip(expert.train_losses[:10], alone.train_losses[:10], strict=True))
        factors = (vector(expert) - vector(alone)).norm() / vector(alone).norm()
        validation = abs(expert.val_losses[-1][1] / alone.val_losses[-1][1] - 1)
        print(f"{expert.name}: ten losses {first:.1e}, factors {factors:.1e}, validation loss {validation:.1e}")
