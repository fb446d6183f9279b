"""Against PEFT in the same process: training, and what was trained.

Tolerances are relative to the experts' effect: the largest difference between routed and bare logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.adapters import write_adapter
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate, input_length, plan_batches
from lorary.formats.peft import read_adapter
from lorary.formats.peft_config import new_config
from lorary.lora.targets import find_targets
from lorary.model.attach import routing
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit

peft = pytest.importorskip("peft")
# PEFT asks transformers by a name that is on its way out.

Make = Callable[..., Any]
TARGETS = ("q_proj", "o_proj", "down_proj")
IDS = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def effect(model: Any) -> float:
    with routing(model, "base"):
        bare = logits(model)
    largest = float((logits(model) - bare).abs().max())
    assert largest > 0.1
    return largest


def saved(adapters: Sequence[Adapter], folder: Path) -> list[str]:
    for adapter in adapters:
        write_adapter(adapter, folder / adapter.name)
    return [str(folder / adapter.name) for adapter in adapters]


# Training.


def train_here(model: Any, jobs: list[Job], settings: LoopSettings) -> list[TrainedUnit]:
    finished: list[TrainedUnit] = []
    stack = expert_stack(model, find_targets(model, TARGETS), jobs, len(jobs))
    train_queue(model, jobs, stack, settings, on_finish=finished.append)
    return sorted(finished, key=lambda unit: unit.name)


def train_in_peft(model: Any, expert: Job, settings: LoopSettings, folder: Path) -> tuple[list[float], Adapter]:
    """The plain loop anybody would write with PEFT and torch, over the same batches from the same initial weights."""
    s, targets = settings.optimiser, find_targets(model, TARGETS)
    stack = expert_stack(model, targets, [expert], 1)
    stack.fill(0, expert, settings.seed, settings.init, settings.init_scale)
    start = stack.result(0, expert, stack.parameters).adapters[expert.name]
    config = peft.LoraConfig(r=expert.rank, lora_alpha=expert.alpha, target_modules=list(TARGETS))
    lora = peft.get_peft_model(model, config)
    for path, factors in start.items():
        layer = lora.get_submodule(f"base_model.model.{path}")
        layer.lora_A["default"].weight.data.copy_(factors.lora_a)
        layer.lora_B["default"].weight.data.copy_(factors.lora_b)
    parameters = [p for p in lora.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=s.learning_rate, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: s.rate_at(step, expert.num_steps) / s.learning_rate
    )
    losses = []
    plan = plan_batches([input_length(x) for x in expert.train], settings.batch_size, expert.num_steps, 0, expert.name)
    for rows in plan:
        batch = collate([expert.train[row] for row in rows])
        labels = torch.full(batch.input_ids.shape, -100)
        labels[batch.rows, batch.positions] = batch.labels
        # The mean over the target tokens of the whole batch.
        found = lora(input_ids=batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, s.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    lora.save_pretrained(folder)
    return losses, read_adapter(folder, expert.name)


# Rows that share tokens meet the float32 that transformers computes norms in elsewhere, even in a float64 model; the
# layout itself is held to 1e-9 in tests/unit/model/test_packed.py.
@pytest.mark.parametrize(("packs", "tolerance"), [(False, 1e-9), (True, 1e-5)])
@pytest.mark.parametrize("max_tokens", [1000, 20])
def test_training_equals_a_plain_loop_with_peft_and_torch(
    tiny_model: Make, random_examples: Make, generator: torch.Generator, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, packs: bool, tolerance: float,
) -> None:  # fmt: skip
    monkeypatch.setattr("lorary.train.forward.can_pack", lambda model: packs)
    rows = random_examples(9, generator)
    halves = {"one": rows[:5], "two": rows[5:]}
    experts = [Job(name, own, own, num_steps=10, rank=2, alpha=8.0) for name, own in halves.items()]
    optimiser = OptimiserSettings(0.01, clip=0.5, weight_decay=0.05)
    settings = LoopSettings(optimiser, batch_size=3, num_evals=1, max_tokens=max_tokens)
    model = tiny_model(dtype=torch.float64)
    trained = train_here(model, experts, settings)
    for expert, found in zip(experts, trained, strict=True):
        losses, theirs = train_in_peft(tiny_model(dtype=torch.float64), expert, settings, tmp_path / expert.name)
        assert found.best_step == 10
        assert found.train_losses == pytest.approx(losses, rel=tolerance)
        modules = found.adapters[expert.name]
        assert set(modules) == set(theirs.modules)
        for path, factors in theirs:
            assert modules[path].scaling == factors.scaling == 4.0
            for own, other in ((modules[path].lora_a, factors.lora_a), (modules[path].lora_b, factors.lora_b)):
                assert (own - other).norm() < tolerance * other.norm()


def test_a_trained_adapter_answers_in_peft_as_it_does_here(
    tiny_model: Make, random_examples: Make, route: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    rows = random_examples(4, generator)
    settings = LoopSettings(OptimiserSettings(0.02), batch_size=2, num_evals=1)
    model = tiny_model(dtype=torch.float64)
    (expert,) = train_here(model, [Job("one", rows, rows, num_steps=6, rank=2, alpha=8.0)], settings)
    config = new_config(None, rank=2, alpha=8.0, target_modules=TARGETS)
    adapter = replace(Adapter("one", expert.adapters["one"], config))
    (folder,) = saved([adapter], tmp_path)
    route(model, [adapter], top_k=1)
    expected = logits(peft.PeftModel.from_pretrained(tiny_model(dtype=torch.float64), folder))
    assert (logits(model) - expected).abs().max() < 1e-9 * effect(model)
