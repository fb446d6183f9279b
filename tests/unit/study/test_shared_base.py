"""The stages of a study share one loaded base model, and each leaves it bare, also where it fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.recipes import reproduce
from lorary.recipes.reproduce import open_study
from lorary.study.context import TimedDisplay
from lorary.study.record import DONE, FAILED


def state_of(model: Any) -> dict[str, Any]:
    """All of a model that a stage may have changed: modules, hooks, parameters and what is written on them."""
    modules = {
        name: (type(module), module.training, *(len(module.__dict__[key]) for key in module.__dict__ if "hooks" in key))
        for name, module in model.named_modules()
    }
    parameters = {
        name: (own.data_ptr(), own.requires_grad, own.grad is None, float(own.double().sum()))
        for name, own in model.named_parameters()
    }
    attention = model.config.get_text_config()._attn_implementation
    return {"modules": modules, "parameters": parameters, "keys": set(model.__dict__), "attention": attention,
            "generation": model.generation_config.to_dict()}  # fmt: skip


@pytest.mark.parametrize("failing", [(), (2, 5, 9, 14)])
def test_every_stage_leaves_the_shared_base_bare(
    failing: tuple[int, ...], make_study: Callable[..., Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = ("routers: [arrow, oracle]", "routers: [arrow, oracle, phatgoose]")
    context = open_study(str(make_study(change)), str(out))
    bare, base, calls, real = state_of(context.base.model), context.base, 0, reproduce._run_stage

    def check_time(self: TimedDisplay) -> None:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise MemoryError("no memory left")

    def checked(*args: Any) -> str:
        state = real(*args)
        assert context.base is base
        assert state_of(base.model) == bare, args[1]
        return state

    monkeypatch.setattr(TimedDisplay, "check_time", check_time)
    monkeypatch.setattr(reproduce, "_run_stage", checked)
    seen = set()
    for _ in range(2):
        seen |= set(reproduce._run_stages(context, context.study.stages).values())
    assert DONE in seen
    assert (FAILED in seen) == bool(failing)
