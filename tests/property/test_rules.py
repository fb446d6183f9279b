"""The invariants of routing for every rule that needs no data, and for every moment of decision.

Arrow under the default settings has its own file; here all rules go through the same tests. Tolerances are relative to
the experts' effect on the logits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.model.attach import detach, routing
from lorary.model.trace import trace
from lorary.route import ROUTERS

Make = Callable[..., Any]
SCORING = [name for name, rule in ROUTERS.items() if rule.scores is not None and rule.needs in ("weights", "probe")]
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{name} per {per}": {"router": name, "per": per} for name in SCORING for per in ROUTERS[name].pers},
    "lag of two": {"router": "lag", "candidates": 2},
    "arrow of unit inputs": {"input_norm": "unit", "temperature": 0.1},
    "norm of layer-normalised inputs": {"router": "norm", "input_norm": "layer"},
    "arrow with all steps": {"top_p": 0.9, "threshold": 1e-3, "null": 0.2, "top_k": 3},
    "projection at unit scale": {"router": "projection", "scale": "unit"},
    "arrow tied": {"tie": "concat"},
}
EVERY = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
IDS = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(7))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **inputs).logits
    return found


def effect(model: Any) -> float:
    with routing(model, "base"):
        bare = logits(model)
    largest = float((logits(model) - bare).abs().max())
    assert largest > 0.05
    return largest


def experts_for(make: Make, model: Any) -> list[Adapter]:
    """Unequal ranks and sizes, one expert in the first layer only."""
    shapes: list[dict[str, Any]] = [{"rank": 1}, {"rank": 3, "layers": [0]}, {"rank": 2, "size": 1.5}, {"rank": 3}]
    targets = ("q_proj", "k_proj", "o_proj", "down_proj")
    return [make(model, f"e{i}", seeded(i), targets=targets, **shape) for i, shape in enumerate(shapes)]


def regauged(adapter: Adapter, generator: torch.Generator) -> Adapter:
    modules = {}
    for path, factors in adapter:
        rank = factors.rank
        left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q for _ in "lr")
        gauge = left * torch.logspace(0, 1, rank, dtype=torch.float64) @ right
        lora_b = torch.linalg.solve(gauge, factors.lora_b, left=False)
        modules[path] = LoraFactors(gauge @ factors.lora_a, lora_b, factors.scaling)
    return Adapter(adapter.name, modules, adapter.config)


@pytest.fixture
def model(tiny_model: Make) -> Any:
    return tiny_model(dtype=torch.float64)


@EVERY
def test_gauge_and_order_change_nothing(model: Any, random_adapter: Make, route: Make, setting: dict[str, Any]) -> None:
    experts, setting = experts_for(random_adapter, model), {"top_k": 2, **setting}
    found = logits(route(model, experts, **setting))
    scale = effect(model)
    detach(model)
    turned = [regauged(expert, seeded(50 + i)) for i, expert in enumerate(experts)]
    assert (logits(route(model, turned, **setting)) - found).abs().max() < 1e-9 * scale
    detach(model)
    renamed = [replace(expert, name=f"e{(3 * i + 1) % 4}") for i, expert in enumerate(experts)]
    assert (logits(route(model, renamed, **setting)) - found).abs().max() < 1e-9 * scale
    detach(model)
    assert torch.equal(logits(route(model, experts[::-1], **setting)), found)


@EVERY
def test_company_and_padding_change_nothing(
    model: Any, random_adapter: Make, route: Make, setting: dict[str, Any]
) -> None:
    route(model, experts_for(random_adapter, model), **{"top_k": 2, **setting})
    scale = effect(model)
    mask = torch.stack([torch.arange(9) < length for length in (9, 4, 6)])
    for side in (mask, mask.flip(1)):
        positions = (side.cumsum(1) - 1).clamp_min(0)
        together = logits(model, attention_mask=side.long(), position_ids=positions)
        for row in range(3):
            alone = logits(model, IDS[row, side[row]][None])
            assert (together[row, side[row]] - alone[0]).abs().max() < 1e-9 * scale


def generate(model: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    mask = torch.stack([torch.arange(9) >= start for start in (0, 5, 2)]).long()
    found = model.generate(
        IDS, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits, dim=1)


@EVERY
def test_cached_generation_equals_uncached(
    model: Any, random_adapter: Make, route: Make, setting: dict[str, Any]
) -> None:
    route(model, experts_for(random_adapter, model), **{"top_k": 2, **setting})
    scale = effect(model)
    cached, steps = generate(model)
    uncached, uncached_steps = generate(model, use_cache=False)
    assert torch.equal(cached, uncached)
    assert (steps - uncached_steps).abs().max() < 1e-9 * scale


@EVERY
def test_a_static_cache_and_beams_route_as_usual(
    model: Any, random_adapter: Make, route: Make, setting: dict[str, Any]
) -> None:
    route(model, experts_for(random_adapter, model), **{"top_k": 2, **setting})
    scale = effect(model)
    cached, steps = generate(model)
    static, static_steps = generate(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(cached, static)
    assert (steps - static_steps).abs().max() < 1e-9 * scale
    beams, _ = generate(model, num_beams=2)
    uncached_beams, _ = generate(model, num_beams=2, use_cache=False)
    assert torch.equal(beams, uncached_beams)


@pytest.mark.parametrize(("name", "per"), [(name, per) for name in SCORING for per in ROUTERS[name].pers])
def test_one_expert_is_that_expert_in_full(model: Any, random_adapter: Make, route: Make, name: str, per: str) -> None:
    route(model, [random_adapter(model, "one", seeded(0))], router=name, per=per, top_k=1)
    found = logits(model)
    with routing(model, {"experts": ["one"]}):
        assert (found - logits(model)).abs().max() < 1e-9 * effect(model)


@pytest.mark.parametrize("name", SCORING)
def test_zero_experts_are_never_chosen(model: Any, random_adapter: Make, route: Make, name: str) -> None:
    live = experts_for(random_adapter, model)
    found = logits(route(model, live, router=name, top_k=2))
    scale = effect(model)
    detach(model)
    zeros = [random_adapter(model, other, seeded(9), size=0.0) for other in ("a", "f")]
    route(model, [*live, *zeros], router=name, top_k=2)
    with trace(model) as traced:
        assert (logits(model) - found).abs().max() < 1e-9 * scale
    assert traced.usage()["a"] == traced.usage()["f"] == 0


@pytest.mark.parametrize("name", SCORING)
def test_float32_is_as_exact_as_float32_can_be(tiny_model: Make, random_adapter: Make, route: Make, name: str) -> None:
    wide = tiny_model(dtype=torch.float64)
    experts = experts_for(random_adapter, wide)
    exact = logits(route(wide, experts, router=name, top_k=4))
    narrow = tiny_model()
    found = logits(route(narrow, experts, router=name, top_k=4))
    assert (found - exact).abs().max() < 1e-4 * effect(wide)
