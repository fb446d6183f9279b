"""PHATGOOSE's gates, against a plain loop over merged updates with torch's own optimiser."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.data.batching import collate, input_length, plan_batches
from lorary.data.template import Example
from lorary.errors import TrainError, UsageError
from lorary.prepare.phatgoose import train_gates
from lorary.prepare.settings import GateSettings

Make = Callable[..., Any]
SETTINGS = GateSettings(steps=6, batch_size=3, learning_rate=0.05, seed=4)


def plain_gates(model: Any, adapter: Any, examples: list[Example], settings: GateSettings) -> dict[str, Tensor]:
    gates = {path: torch.zeros(own.d_in, dtype=torch.float64, requires_grad=True) for path, own in adapter}
    handles = []
    for path, factors in adapter:

        def gated(_layer: Any, args: Any, output: Tensor, g: Tensor = gates[path], own: Any = factors) -> Tensor:
            return output + torch.sigmoid(args[0] @ g)[..., None] * (args[0] @ own.delta().mT)

        handles.append(model.get_submodule(path).register_forward_hook(gated))
    optimiser = torch.optim.AdamW(gates.values(), lr=settings.learning_rate, weight_decay=0.0)
    # Up over one step (a tenth of six, rounded up), then down to zero after the last.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.0 if step == 0 else (6 - step) / 5)
    lengths = [input_length(example) for example in examples]
    for rows in plan_batches(lengths, settings.batch_size, settings.steps, "gates", settings.seed, adapter.name):
        batch = collate([examples[i] for i in rows])
        logits = model(input_ids=batch.input_ids).logits[batch.rows, batch.positions]
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(gates.values(), 1.0)
        optimiser.step()
        schedule.step()
    for handle in handles:
        handle.remove()
    return {path: gate.detach() for path, gate in gates.items()}


def test_gates_learn_as_in_a_plain_loop(
    tiny_model: Make, random_adapter: Make, random_examples: Make, generator: torch.Generator
) -> None:
    model = tiny_model(dtype=torch.float64)
    adapter, examples = random_adapter(model, "own", generator), random_examples(7, generator)
    found, losses = train_gates(model, adapter, examples, SETTINGS)
    expected = plain_gates(model, adapter, examples, SETTINGS)
    assert len(losses) == 6
    for path, gate in expected.items():
        assert gate.abs().max() > 0.01
        assert torch.allclose(found[path], gate, rtol=1e-6, atol=1e-8), path
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("lorary" in name for name, _ in model.named_modules())


def test_gates_are_a_function_of_their_seed(
    tiny_model: Make, random_adapter: Make, random_examples: Make, generator: torch.Generator
) -> None:
    model = tiny_model()
    adapter, examples = random_adapter(model, "own", generator), random_examples(7, generator)
    one, again = (train_gates(model, adapter, examples, SETTINGS)[0] for _ in range(2))
    other, _ = train_gates(model, adapter, examples, GateSettings(6, 3, 0.05, seed=5))
    assert all(torch.equal(one[path], again[path]) for path in one)
    assert not all(torch.equal(one[path], other[path]) for path in one)


def test_what_cannot_be_trained_is_refused(
    tiny_model: Make, random_adapter: Make, random_examples: Make, generator: torch.Generator
) -> None:
    with pytest.raises(UsageError, match="--steps must be above 0"):
        GateSettings(steps=0)
    model = tiny_model()
    adapter = random_adapter(model, "own", generator)
    model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(TrainError, match="gates of expert 'own' must be finite at step 0"):
        train_gates(model, adapter, [Example((5, 6), (7,), 0)], SETTINGS)
