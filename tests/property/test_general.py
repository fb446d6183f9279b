"""General knowledge: experts without what general experts know, by its definition on full matrices.

Tolerances are relative to the experts' effect: the largest difference between routed and bare logits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import RouterError, UsageError
from lorary.model.attach import routing
from lorary.model.live import add_expert, remove_expert, replace_expert
from lorary.model.save import load, save
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.route.setting import Routing

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (3, 7), generator=torch.Generator().manual_seed(5))
GENERAL = ["g0", "g1"]


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, **inputs).logits
    return found


def distance(model: Any, expected: Tensor) -> float:
    """How far a model's logits are from those expected, relative to the effect of its experts."""
    with routing(model, "base"):
        effect = float((expected - logits(model)).abs().max())
    assert effect > 0.05
    return float((logits(model) - expected).abs().max()) / effect


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> list[Adapter]:
    """Unequal ranks; 'b' adapts the first layer only, 'z' does nothing, 'g1' has one layer of its own."""
    shapes: dict[str, dict[str, Any]] = {
        "a": {"rank": 1}, "b": {"layers": [0]}, "c": {"rank": 2, "size": 1.5}, "z": {"size": 0.0},
        "g0": {"rank": 2, "size": 0.6}, "g1": {"layers": [1], "targets": ("q_proj", "up_proj")},
    }  # fmt: skip
    model = tiny_model(dtype=torch.float64)
    return [random_adapter(model, name, generator, **shape) for name, shape in shapes.items()]


def updates_without(adapters: Sequence[Adapter], path: str, mode: str) -> dict[str, Tensor]:
    """The update of each expert that does something in a layer, without the general ones."""
    general = [a.modules[path] for a in adapters if a.name in GENERAL and path in a.modules]
    own = {a.name: a.modules[path] for a in adapters if a.name not in GENERAL and path in a.modules}
    alive = {name: factors for name, factors in own.items() if factors.lora_b.any()}
    if mode == "delta":
        mean = sum((g.delta() for g in general), torch.zeros(())) / len(GENERAL)
        return {name: factors.delta() - mean for name, factors in alive.items()}
    mean_a = sum(g.lora_a for g in general) / len(GENERAL)
    mean_b = sum(g.lora_b for g in general) / len(GENERAL)
    return {name: f.scaling * (f.lora_b - mean_b) @ (f.lora_a - mean_a) for name, f in alive.items()}


def score(router: str, update: Tensor, x: Tensor) -> float:
    if router == "norm":
        return float((update @ x).norm())
    _, values, directions = torch.linalg.svd(update, full_matrices=False)
    kept = 1 if router == "arrow" else int((values > 1e-6 * values[0]).sum())
    return float((directions[:kept] @ x).norm())


def by_definition(model: Any, adapters: Sequence[Adapter], router: str, mode: str, top_k: int = 2) -> Tensor:
    """Logits of a model whose layers are routed token by token in plain loops."""

    def routed(path: str) -> Callable[..., Tensor]:
        updates = updates_without(adapters, path, mode)

        def hook(_layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            result = output.clone()
            for row, column in ((r, c) for r in range(output.shape[0]) for c in range(output.shape[1])):
                x = args[0][row, column]
                if router == "uniform":  # over all that are not general, whether they are here or not
                    weights = dict.fromkeys(updates, 1 / (len(adapters) - len(GENERAL)))
                else:
                    scores = {name: score(router, update, x) for name, update in updates.items()}
                    best = sorted(scores, key=lambda name: -scores[name])[:top_k]
                    shares = torch.tensor([scores[name] for name in best], dtype=torch.float64).softmax(0)
                    weights = dict(zip(best, shares.tolist(), strict=True))
                for name, weight in weights.items():
                    result[row, column] += weight * (updates[name] @ x)
            return result

        return hook

    for path in {path for adapter in adapters for path in adapter.modules}:
        model.get_submodule(path).register_forward_hook(routed(path))
    return logits(model)


@pytest.mark.parametrize("router", ["arrow", "projection", "norm", "uniform"])
def test_experts_act_and_are_scored_without_the_mean_of_the_general_ones(
    tiny_model: Make, adapters: list[Adapter], route: Make, router: str
) -> None:
    expected = by_definition(tiny_model(dtype=torch.float64), adapters, router, "delta")
    model = route(tiny_model(dtype=torch.float64), adapters, router=router, top_k=2, general=GENERAL)
    assert distance(model, expected) < 1e-9


@pytest.mark.parametrize("router", ["arrow", "norm", "uniform"])
def test_factors_lose_the_means_of_the_general_factors(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, router: str
) -> None:
    model = tiny_model(dtype=torch.float64)
    adapters = [random_adapter(model, name, generator) for name in ("a", "b", "c", *GENERAL)]
    # Scalings that differ: those of the general experts take no part.
    scaled = []
    for i, adapter in enumerate(adapters):
        modules = {path: LoraFactors(f.lora_a, f.lora_b, 0.5 + i) for path, f in adapter}
        scaled.append(Adapter(adapter.name, modules, {**adapter.config, "lora_alpha": 1.5 + 3 * i}))
    expected = by_definition(tiny_model(dtype=torch.float64), scaled, router, "factors")
    route(model, scaled, router=router, top_k=2, general=GENERAL, general_mode="factors")
    assert distance(model, expected) < 1e-9


def test_factors_without_general_ones_can_be_mixed_as_factors(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model = tiny_model(dtype=torch.float64)
    adapters = {name: random_adapter(model, name, generator) for name in ("a", "b", *GENERAL)}
    merged = tiny_model(dtype=torch.float64)
    for path in adapters["a"].modules:
        a, b, g0, g1 = (adapter.modules[path] for adapter in adapters.values())
        own_a = [f.lora_a - (g0.lora_a + g1.lora_a) / 2 for f in (a, b)]
        own_b = [f.scaling * (f.lora_b - (g0.lora_b + g1.lora_b) / 2) for f in (a, b)]
        mean_a, mean_b = (0.7 * one + 0.3 * two for one, two in (own_a, own_b))
        merged.get_submodule(path).weight += mean_b @ mean_a
    experts = {"a": 0.7, "b": 0.3}
    route(model, list(adapters.values()), experts=experts, mix="factors", general=GENERAL, general_mode="factors")
    assert distance(model, logits(merged)) < 1e-9


def test_the_gauge_of_any_factors_changes_nothing_in_update_space(
    tiny_model: Make, adapters: list[Adapter], route: Make, generator: torch.Generator
) -> None:
    def turned(adapter: Adapter) -> Adapter:
        modules = {}
        for path, factors in adapter:
            gauge = torch.eye(factors.rank).double() + 0.3 * torch.randn(
                factors.rank, factors.rank, generator=generator
            )
            lora_b = torch.linalg.solve(gauge, factors.lora_b, left=False)
            modules[path] = LoraFactors(gauge @ factors.lora_a, lora_b, factors.scaling)
        return Adapter(adapter.name, modules, adapter.config)

    settings: dict[str, Any] = {"top_k": 2, "general": GENERAL, "router": "projection"}
    expected = logits(route(tiny_model(dtype=torch.float64), adapters, **settings))
    assert distance(route(tiny_model(dtype=torch.float64), [turned(a) for a in adapters], **settings), expected) < 1e-9


def test_an_expert_that_is_no_more_than_general_is_never_chosen(
    tiny_model: Make, adapters: list[Adapter], route: Make
) -> None:
    twin = Adapter("twin", adapters[4].modules, adapters[4].config)
    for narrow in (False, True):
        model = tiny_model() if narrow else tiny_model(dtype=torch.float64)
        route(model, [*adapters[:3], adapters[4], twin], top_k=2, general=["g0"])
        for router in ("arrow", "projection", "norm"):
            with routing(model, router), trace(model) as traced:
                logits(model)
            assert traced.usage()["twin"] == traced.usage()["g0"] == 0


@pytest.mark.parametrize("setting", [{"per": "request"}, {"per": "token"}, {"router": "logo"}, {"router": "lag"}])
def test_a_row_alone_equals_the_row_in_a_padded_batch(
    tiny_model: Make, adapters: list[Adapter], route: Make, setting: dict[str, Any]
) -> None:
    model = route(tiny_model(dtype=torch.float64), adapters, top_k=2, general=GENERAL, **setting)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] + [1] * 6])
    together = logits(model, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    for row in range(3):
        real = mask[row].bool()
        alone = model(input_ids=IDS[row, real][None]).logits[0]
        assert torch.allclose(together[row, real], alone, atol=1e-9)


def test_experts_stay_as_they_are_and_come_back_with_the_next_setting(
    tiny_model: Make, adapters: list[Adapter], route: Make
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    before = logits(model)
    stacks = {path: (layer.lora.down.clone(), layer.lora.up.clone()) for path, layer in seating(model).layers.items()}
    with routing(model, {"general": GENERAL}):
        without = logits(model)
        model.to(torch.bfloat16).to(torch.float32)  # what is taken away moves with the model
        assert torch.allclose(logits(model), without, atol=0.2)
    for path, layer in seating(model).layers.items():
        assert torch.equal(layer.lora.down, stacks[path][0])
        assert torch.equal(layer.lora.up, stacks[path][1])
    assert not torch.allclose(without, before, atol=0.05)


def test_experts_come_and_go_under_general_ones(
    tiny_model: Make, adapters: list[Adapter], route: Make, tmp_path: Any
) -> None:
    settings: dict[str, Any] = {"top_k": 2, "general": ["g0"]}
    model = route(tiny_model(), [adapters[0], adapters[4], adapters[5]], **settings)
    add_expert(model, adapters[2])
    remove_expert(model, "a")
    replace_expert(model, adapters[1], "g0")
    new = Adapter("g0", adapters[1].modules, adapters[1].config)
    fresh = route(tiny_model(), [adapters[2], new, adapters[5]], **settings)
    assert torch.allclose(logits(model), logits(fresh), atol=1e-4)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    assert seating(again).routing.general.experts == ["g0"]
    assert torch.equal(logits(again), logits(model))
    remove_expert(model, "g1")
    with pytest.raises(RouterError, match="that is not general must be left to choose"):
        remove_expert(model, "c")
    with pytest.raises(RouterError, match=r"that the router in force names must stay\nfound: g0"):
        remove_expert(model, "g0")
    assert seating(model).experts == ("c", "g0")


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"general": ["x"]}, RouterError, r"general experts must be seated\nfound: \['x'\]"),
        ({"general": ["a", "b", "c", "z", *GENERAL]}, RouterError, "must be left to choose"),
        ({"general": []}, UsageError, "general must be a list of different experts"),
        ({"general": ["g0"], "experts": ["g0"]}, RouterError, r"cannot be chosen themselves\nfound: \['g0'\]"),
        ({"general": ["g0"], "allow": ["a", "g0"]}, RouterError, r"cannot be chosen themselves\nfound: \['g0'\]"),
        ({"general": ["g0"], "mix": "factors"}, RouterError, "needs factors to take away"),
        ({"general": ["g0"], "tie": "concat"}, UsageError, "know experts as they are stored"),
        ({"general": ["g1"], "general_mode": "factors"}, RouterError, r"at layer 'model.layers.0.*\nfound: 'g1' lacks"),
        ({"general": ["g0"], "general_mode": "factors"}, RouterError, r"needs all experts of one rank.*\nfound: ranks"),
        ([{"general": ["g0"]}, "arrow", "arrow"], RouterError, "must share their general experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_away_is_refused_and_changes_nothing(
    tiny_model: Make, adapters: list[Adapter], route: Make, setting: Any, error: type[Exception], message: str
) -> None:
    model = route(tiny_model(), adapters, top_k=2)
    before = logits(model)
    with pytest.raises(error, match=message):
        routing(model, setting).__enter__()
    assert seating(model).routing == Routing.of(top_k=2)
    assert torch.equal(logits(model), before)
