"""Half precision: the base computes in bfloat16, and nothing that is trained is ever rounded to it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.lora.stacked import StackedLora
from lorary.lora.targets import find_targets
from lorary.train import forward
from lorary.train.callbacks import Callback
from lorary.train.forward import Forward
from lorary.train.loop import seated
from lorary.train.slots import Slots
from lorary.train.stack import expert_stack
from lorary.train.units import Job, LoopSettings, TrainedUnit

Make = Callable[..., Any]


def losses(units: list[TrainedUnit]) -> list[float]:
    return [loss for unit in units for loss in (*unit.train_losses, *(val for _, val in unit.val_losses))]


def gradient(model: Any, jobs: list[Job], settings: LoopSettings) -> Tensor:
    """Of the second step, where no factor is zero any more."""
    stack = expert_stack(model, find_targets(model, ["v_proj", "down_proj"]), jobs, len(jobs))
    slots = Slots(jobs, stack, settings)
    with seated(model, stack, settings):
        run = Forward(model, stack, settings)
        slots.fill()
        slots.step(run.train_losses(slots.present(), 10_000))
        run.train_losses(slots.present(), 10_000)
    return stack.gradient.clone()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_losses_are_those_of_float32_to_the_precision_of_bfloat16(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make, monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype, dropout: float,
) -> None:  # fmt: skip
    kinds: set[tuple[torch.dtype, ...]] = set()
    added = StackedLora.add

    def add(self: StackedLora, x: Tensor, output: Tensor) -> Tensor:
        down, up = self.of_spans()
        kinds.add((output.dtype, down.dtype, up.dtype))
        assert not torch.is_autocast_enabled("cpu")
        return added(self, x, output)

    exact = losses(train(tiny_model(), jobs, loop_settings(dropout=dropout)))
    monkeypatch.setattr(StackedLora, "add", add)
    units = train(tiny_model(dtype=dtype), jobs, loop_settings(dropout=dropout, autocast=True))
    assert kinds == {(torch.bfloat16, torch.float32, torch.float32)}
    assert losses(units) == pytest.approx(exact, rel=0.02)
    assert losses(units) != exact
    for unit in units:
        assert {f.lora_a.dtype for f in unit.adapters[unit.name].values()} == {torch.float32}


def test_masters_moments_gradients_norms_and_losses_are_float32_under_autocast(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = tiny_model(dtype=torch.bfloat16), loop_settings(autocast=True)
    kinds = []
    computed = forward.target_losses
    monkeypatch.setattr(forward, "target_losses", lambda *args: kinds.append(computed(*args)) or kinds[-1])
    stack = expert_stack(model, find_targets(model, ["v_proj"]), jobs, 3)
    slots = Slots(jobs, stack, settings)
    with seated(model, stack, settings):
        slots.fill()
        Forward(model, stack, settings).train_losses(slots.present(), 10_000)
    norms = [slots.optimiser.step(index, 0, 8) for index in range(3)]
    vectors = (stack.parameters, stack.gradient, slots.optimiser.first, slots.optimiser.second, slots.best)
    assert {tensor.dtype for tensor in (*vectors, *norms, *kinds)} == {torch.float32}
    assert all(norm > 0 for norm in norms)
    assert not torch.is_autocast_enabled("cpu")


def test_gradients_under_autocast_are_those_of_float32_to_the_precision_of_bfloat16(
    tiny_model: Make, jobs: list[Job], loop_settings: Make
) -> None:
    exact = gradient(tiny_model(), jobs, loop_settings())
    narrow = gradient(tiny_model(), jobs, loop_settings(autocast=True))
    assert (narrow - exact).norm() < 0.06 * exact.norm()
    assert not torch.equal(narrow, exact)
    # None was rounded to bfloat16 itself: that would leave the lower half of each number zero.
    assert (narrow.view(torch.int32)[narrow != 0] & 0xFFFF != 0).float().mean() > 0.9


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_gives_the_same_gradients_to_the_bit_and_keeps_less(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, dropout: float, autocast: bool
) -> None:
    gradients, kept = {}, {}
    for does in (False, True):
        sizes: dict[int, int] = {}

        def count(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        settings = loop_settings(dropout=dropout, autocast=autocast, activation_checkpointing=does)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            gradients[does] = gradient(tiny_model(num_hidden_layers=4), jobs, settings)
        kept[does] = sum(sizes.values())
    assert torch.equal(gradients[False], gradients[True])
    assert gradients[True].count_nonzero() > 0
    assert kept[True] < kept[False]


def test_autocast_is_over_outside_of_training_and_the_base_is_untouched(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []

    class Looks(Callback):
        def on_step(self, *_args: Any) -> None:
            seen.append((torch.is_autocast_enabled("cpu"), "forward" in vars(model.model.layers[0].mlp.up_proj)))

    train(model, [replace(jobs[0], num_steps=1)], loop_settings(autocast=True), callbacks=[Looks()])
    assert seen == [(False, False)]  # weights that were reordered in float32 would not be multiplied in bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_base_in_float16_is_refused_by_name(
    tiny_model: Make, jobs: list[Job], loop_settings: Make, train: Make
) -> None:
    with pytest.raises(UsageError, match=r"not be in float16 .*\nfound: torch.float16\nremedy: --dtype bfloat16"):
        train(tiny_model(dtype=torch.float16), jobs, loop_settings())
