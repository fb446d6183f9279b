"""Against PEFT in the same process: plain LoRA, Arrow and training, and one place where PEFT is not exact.

Tolerances are relative to the experts' effect: the largest difference between routed and bare logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.batching import collate, input_length, plan_batches
from lorary.formats.peft import new_config, read_adapter, write_adapter
from lorary.lora.targets import find_targets
from lorary.model.attach import routing, seating
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit

peft = pytest.importorskip("peft")
# PEFT asks transformers by a name that is on its way out.

Make = Callable[..., Any]
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
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


# One expert: PEFT's own LoRA.


@DTYPES
@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_k": 4}, {"router": "uniform"}, {"experts": ["one"]}])
def test_one_expert_equals_lora_inference_in_peft(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path,
    settings: dict[str, Any], dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    adapter = random_adapter(tiny_model(dtype=dtype), "one", generator)
    (folder,) = saved([adapter], tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(tiny_model(dtype=dtype), folder))
    model = route(tiny_model(dtype=dtype), [adapter], **settings)
    assert (logits(model) - expected).abs().max() < tolerance * effect(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"o_proj": 2}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 11, "down_proj": 1}},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    ],
)
def test_patterns_and_rslora_mean_what_they_mean_in_peft(
    tiny_model: Make, route: Make, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(TARGETS), init_lora_weights=False, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = peft.get_peft_model(tiny_model(dtype=torch.float64), config)
    theirs.save_pretrained(tmp_path / "one")
    model = route(tiny_model(dtype=torch.float64), [read_adapter(tmp_path / "one")], top_k=1)
    assert (logits(model) - logits(theirs.eval())).abs().max() < 1e-9 * effect(model)


# Arrow.


def arrow_in_peft(model: Any, adapters: Sequence[Adapter], folder: Path, top_k: int, temperature: float) -> Tensor:
    settings = peft.ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    return logits(peft.create_arrow_model(model, saved(adapters, folder), settings))


def arrow_in_float64(model: Any, adapters: Sequence[Adapter], top_k: int, temperature: float) -> Tensor:
    """Arrow by its definition: a full SVD of each update, then token by token in plain loops."""

    def routed(path: str) -> Callable[..., Tensor]:
        deltas = [adapter.modules[path].scaling * full_product(adapter, path) for adapter in adapters]
        prototypes = [torch.linalg.svd(full_product(adapter, path)).Vh[0] for adapter in adapters]

        def hook(_layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            result = output.clone()
            for row, column in ((r, c) for r in range(output.shape[0]) for c in range(output.shape[1])):
                x = args[0][row, column]
                scores = [abs(float(x @ prototype)) for prototype in prototypes]
                chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
                weights = torch.tensor([scores[e] / temperature for e in chosen], dtype=torch.float64).softmax(0)
                for weight, expert in zip(weights, chosen, strict=True):
                    result[row, column] += weight * (deltas[expert] @ x)
            return result

        return hook

    for path in adapters[0].modules:
        model.get_submodule(path).register_forward_hook(routed(path))
    return logits(model)


def full_product(adapter: Adapter, path: str) -> Tensor:
    factors = adapter.modules[path]
    return factors.lora_b.double() @ factors.lora_a.double()


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (4, 2.0)])
def test_arrow_equals_peft_where_singular_values_are_far_apart(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path,
    top_k: int, temperature: float,
) -> None:  # fmt: skip
    adapters = [random_adapter(tiny_model(), f"e{i}", generator, gap=0.3) for i in range(5)]
    expected = arrow_in_peft(tiny_model(), adapters, tmp_path, top_k, temperature)
    model = route(tiny_model(), adapters, top_k=top_k, temperature=temperature)
    assert (logits(model) - expected).abs().max() < 1e-3 * effect(model)


def test_arrow_is_exact_where_singular_values_are_close_and_peft_is_not(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, tmp_path: Path
) -> None:
    adapters = [random_adapter(tiny_model(), f"e{i}", generator, gap=0.98) for i in range(5)]
    exact = arrow_in_float64(tiny_model().double(), adapters, 2, 1.0)
    theirs = arrow_in_peft(tiny_model(), adapters, tmp_path, 2, 1.0)
    model = route(tiny_model(), adapters, top_k=2)
    assert (logits(model) - exact).abs().max() < 5e-5 * effect(model)
    # Fifteen steps of power iteration from a random start have not found the first direction yet.
    assert (theirs - exact).abs().max() > 1e-2 * effect(model)
    assert not seating(model).ambiguous()


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
