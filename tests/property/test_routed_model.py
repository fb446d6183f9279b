"""What must not change the answer of a routed model, and what its mixtures equal (design: invariants of section 3).

Every tolerance is relative to the experts' effect: the largest difference between routed and bare logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.model.attach import detach, routing
from lorary.model.seating import seating
from lorary.model.trace import trace

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
SEEDS = pytest.mark.parametrize("seed", range(3))
Make = Callable[..., Any]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_ids(seed: int, rows: int = 2, seq: int = 9) -> Tensor:
    return torch.randint(1, 300, (rows, seq), generator=seeded(1000 + seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **inputs).logits
    return found


def effect(model: Any, ids: Tensor) -> float:
    """The largest change that the experts make to a logit."""
    with routing(model, "base"):
        bare = logits(model, ids)
    largest = float((logits(model, ids) - bare).abs().max())
    assert largest > 0.1, "the experts must do something, or nothing is tested"
    return largest


def some_experts(make: Make, model: Any, seed: int, number: int = 5) -> list[Adapter]:
    """Experts of unequal ranks; one adapts only the first layer of the base, one other targets."""
    generator = seeded(seed)
    special: dict[int, dict[str, Any]] = {1: {"layers": [0]}, 3: {"targets": ("q_proj", "up_proj")}}
    return [make(model, f"expert{i}", generator, rank=1 + i % 4, **special.get(i, {})) for i in range(number)]


def in_another_gauge(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """The same function through other factors: A -> GA, B -> BG⁻¹ with a condition number of 10."""
    modules = {}
    for path, factors in adapter:
        rank, dtype = factors.rank, factors.lora_a.dtype
        left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q for _ in "lr")
        gauge = left * torch.logspace(0, 1, rank, dtype=torch.float64) @ right
        lora_b = torch.linalg.solve(gauge, factors.lora_b.double(), left=False)
        modules[path] = LoraFactors((gauge @ factors.lora_a.double()).to(dtype), lora_b.to(dtype), factors.scaling)
    return Adapter(adapter.name, modules, adapter.config)


@SEEDS
@DTYPES
def test_the_gauge_of_the_factors_changes_nothing(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    model, ids = tiny_model(dtype=dtype), token_ids(seed)
    experts = some_experts(random_adapter, model, seed)
    found = logits(route(model, experts, top_k=2), ids)
    scale = effect(model, ids)
    detach(model)
    turned = [in_another_gauge(expert, seeded(seed + 50)) for expert in experts]
    assert (logits(route(model, turned, top_k=2), ids) - found).abs().max() < tolerance * scale


@SEEDS
@DTYPES
def test_the_order_of_the_experts_changes_nothing(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    model, ids = tiny_model(dtype=dtype), token_ids(seed)
    experts = some_experts(random_adapter, model, seed)
    found = logits(route(model, experts, top_k=2), ids)
    scale = effect(model, ids)
    detach(model)
    renamed = [replace(expert, name=f"expert{(7 * i + 3) % 5}") for i, expert in enumerate(experts)]
    assert [e.name for e in renamed] != sorted(e.name for e in renamed)
    assert (logits(route(model, renamed, top_k=2), ids) - found).abs().max() < tolerance * scale


@pytest.mark.parametrize("router", ["arrow", "uniform"])
def test_two_builds_in_any_order_of_adding_give_the_same_bits(
    tiny_model: Make, random_adapter: Make, route: Make, router: str
) -> None:
    model, ids = tiny_model(), token_ids(0)
    experts = some_experts(random_adapter, model, 0)
    first = logits(route(model, experts, router=router, top_k=2), ids)
    detach(model)
    assert torch.equal(logits(route(model, experts[::-1], router=router, top_k=2), ids), first)
    other = tiny_model()
    mixed = [experts[i] for i in (2, 0, 4, 1, 3)]
    assert torch.equal(logits(route(other, mixed, router=router, top_k=2), ids), first)


@SEEDS
def test_the_sign_of_a_prototype_changes_nothing(
    tiny_model: Make, random_adapter: Make, route: Make, seed: int
) -> None:
    model, ids = tiny_model(), token_ids(seed)
    route(model, some_experts(random_adapter, model, seed), top_k=2)
    before = logits(model, ids)
    for layer in seating(model).layers.values():
        layer.lora.down[layer.lora.num_ranks :: 2] *= -1
    assert torch.equal(logits(model, ids), before)


@SEEDS
@DTYPES
def test_a_row_alone_equals_the_row_in_a_padded_batch(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    model, lengths = tiny_model(dtype=dtype), (9, 4, 6)
    ids = token_ids(seed, rows=3)
    route(model, some_experts(random_adapter, model, seed), top_k=2)
    scale = effect(model, ids)
    mask = torch.stack([torch.arange(9) < length for length in lengths])
    for side_mask in (mask, mask.flip(1)):  # padded on the right, then on the left
        positions = (side_mask.cumsum(1) - 1).clamp_min(0)
        together = logits(model, ids, attention_mask=side_mask.long(), position_ids=positions)
        for row in range(3):
            alone = logits(model, ids[row, side_mask[row]][None])
            assert (together[row, side_mask[row]] - alone[0]).abs().max() < tolerance * scale


def generate(model: Any, ids: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits of every step, (rows, steps, vocabulary)."""
    settings = {"attention_mask": torch.ones_like(ids), **settings}
    found = model.generate(
        ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0, **settings,
    )  # fmt: skip
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, dim=1)


@SEEDS
@DTYPES
def test_cached_generation_equals_uncached(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    model, ids = tiny_model(dtype=dtype), token_ids(seed)
    route(model, some_experts(random_adapter, model, seed), top_k=2)
    scale = effect(model, ids)
    cached, cached_logits = generate(model, ids)
    uncached, uncached_logits = generate(model, ids, use_cache=False)
    assert torch.equal(cached, uncached)
    assert (cached_logits - uncached_logits).abs().max() < tolerance * scale


@SEEDS
@DTYPES
def test_generation_for_a_row_does_not_depend_on_its_batch(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    model, ids = tiny_model(dtype=dtype), token_ids(seed, rows=3)
    route(model, some_experts(random_adapter, model, seed), top_k=2)
    scale = effect(model, ids)
    mask = torch.stack([torch.arange(9) >= start for start in (0, 5, 2)]).long()
    tokens, steps = generate(model, ids * mask, attention_mask=mask)
    for row, start in enumerate((0, 5, 2)):
        alone, alone_steps = generate(model, ids[row : row + 1, start:])
        assert torch.equal(alone[0], tokens[row])
        assert (alone_steps[0] - steps[row]).abs().max() < tolerance * scale


@DTYPES
def test_uniform_equals_the_merged_mean_of_the_updates(
    tiny_model: Make, random_adapter: Make, route: Make, dtype: torch.dtype, tolerance: float
) -> None:
    model, ids = tiny_model(dtype=dtype), token_ids(0)
    experts = [*some_experts(random_adapter, model, 0), random_adapter(model, "zero", seeded(9), size=0.0)]
    merged = tiny_model(dtype=torch.float64)
    for expert in experts:
        for path, factors in expert:
            merged.get_submodule(path).weight += (
                factors.scaling / len(experts) * (factors.lora_b.double() @ factors.lora_a.double())
            )
    found = logits(route(model, experts, router="uniform"), ids)
    assert (found - logits(merged, ids)).abs().max() < tolerance * effect(model, ids)


def test_named_experts_share_the_weight(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model, ids = tiny_model(dtype=torch.float64), token_ids(0)
    experts = some_experts(random_adapter, model, 0)
    merged = tiny_model(dtype=torch.float64)
    for expert, weight in ((experts[0], 0.25), (experts[3], -1.5)):
        for path, factors in expert:
            merged.get_submodule(path).weight += weight * factors.delta()
    route(model, experts, experts={"expert0": 0.25, "expert3": -1.5})
    assert (logits(model, ids) - logits(merged, ids)).abs().max() < 1e-9
    with routing(model, {"experts": ["expert0", "expert3"]}):
        halves = logits(model, ids)
    with routing(model, {"experts": {"expert0": 0.5, "expert3": 0.5}}):
        assert torch.equal(logits(model, ids), halves)


def inputs_and_outputs(model: Any, ids: Tensor, paths: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each linear layer was given and what it and its experts gave, (tokens, d_in) and (tokens, d_out)."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = args[0].flatten(0, 1), output.flatten(0, 1)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def mixed_by_hand(x: Tensor, mix: str, weights: Tensor, experts: Sequence[Adapter], path: str) -> Tensor:
    """The mixture of one layer for each token, from full matrices and plain loops."""
    rows = []
    for token, own in zip(x, weights, strict=True):
        factors = [(float(w), e.modules[path]) for w, e in zip(own, experts, strict=True) if path in e.modules]
        if mix == "outputs":
            rows.append(sum(w * f.delta() for w, f in factors) @ token)
        else:
            mean_a, mean_b = sum(w * f.lora_a for w, f in factors), sum(w * f.scaling * f.lora_b for w, f in factors)
            rows.append(mean_b @ (mean_a @ token))
    return torch.stack(rows)


@pytest.mark.parametrize("router", ["arrow", "uniform", "named"])
@pytest.mark.parametrize("mix", ["outputs", "factors"])
def test_both_mixtures_equal_their_definition_token_by_token(
    tiny_model: Make, random_adapter: Make, route: Make, mix: str, router: str
) -> None:
    model, ids = tiny_model(dtype=torch.float64), token_ids(0)
    generator = seeded(3)
    layers: list[Any] = [None, [0], None, [1]]
    experts = [random_adapter(model, f"e{i}", generator, layers=layers[i]) for i in range(4)]
    named = {"e0": 0.7, "e2": 0.0, "e3": 0.3}
    route(model, experts, mix=mix, top_k=2, **({"experts": named} if router == "named" else {"router": router}))
    with trace(model) as traced:
        seen = inputs_and_outputs(model, ids, list(seating(model).layers))
    assert len(seen) == 6
    for path, (x, output) in seen.items():
        if router == "arrow":
            weights = recorded_in_float64(traced, path).flatten(0, 1)
        else:
            fixed = [0.7, 0.0, 0.0, 0.3] if router == "named" else [0.25] * 4
            weights = torch.tensor(fixed, dtype=torch.float64).expand(len(x), 4)
        expected = x @ model.get_submodule(path).weight.mT + mixed_by_hand(x, mix, weights, experts, path)
        # The trace keeps weights in float32.
        assert (output - expected).abs().max() < (1e-6 if router == "arrow" else 1e-12)


def recorded_in_float64(traced: Any, path: str) -> Tensor:
    weights: Tensor = traced.weights(path).double()
    return weights


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_zero_experts_are_never_chosen_by_arrow(
    tiny_model: Make, random_adapter: Make, route: Make, top_k: int
) -> None:
    model, ids, generator = tiny_model(), token_ids(0), seeded(4)
    live = [random_adapter(model, name, generator) for name in ("b", "d")]
    dead = [random_adapter(model, name, generator, size=0.0) for name in ("a", "c")]
    found = logits(route(model, live, top_k=min(top_k, 2)), ids)
    detach(model)
    route(model, [*live, *dead], top_k=top_k)
    with trace(model) as traced:
        with_dead = logits(model, ids)
    usage = traced.usage()
    assert usage["a"] == usage["c"] == 0
    assert usage["b"] + usage["d"] == pytest.approx(1)
    assert (with_dead - found).abs().max() < 1e-4 * effect(model, ids)


def test_zero_experts_alone_leave_the_base_exactly(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model, ids = tiny_model(), token_ids(0)
    bare = logits(model, ids)
    route(model, [random_adapter(model, name, seeded(0), size=0.0) for name in "ab"])
    with trace(model) as traced:
        assert torch.equal(logits(model, ids), bare)
    assert traced.usage() == {"a": 0.0, "b": 0.0}


def test_a_top_k_above_the_number_of_experts_is_clamped(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model, ids = tiny_model(), token_ids(0)
    route(model, [random_adapter(model, name, seeded(ord(name))) for name in "abc"], top_k=3)
    found = logits(model, ids)
    with routing(model, {"top_k": 100}):
        assert torch.equal(logits(model, ids), found)


def test_a_half_precision_base_is_scored_in_float32(tiny_model: Make, random_adapter: Make, route: Make) -> None:
    model, ids = tiny_model(dtype=torch.bfloat16), token_ids(0)
    experts = [random_adapter(model, f"e{i}", seeded(i)) for i in range(6)]
    route(model, experts, top_k=2)
    path = next(iter(seating(model).layers))
    with trace(model) as traced:
        x, _ = inputs_and_outputs(model, ids, [path])[path]
    prototypes = torch.linalg.svd(torch.stack([e.modules[path].delta().double() for e in experts])).Vh[:, 0]
    scores = (x.double() @ prototypes.mT).abs()
    best = scores.topk(2, dim=-1)
    expected = torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(-1))
    assert (traced.weights(path).flatten(0, 1) - expected).abs().max() < 1e-5
    assert logits(model, ids).dtype == torch.bfloat16
