"""The preset `paper-2024` against the recipe of the paper's code, written down a second time in numpy and float64.

The recipe, in its own orientation A (d_in, rank), B (rank, d_out): q, k and v share one A, and one prototype, the first
left singular vector of A [B_q B_k B_v]; the SVD of an update of zero gives that of A itself. A token x has the logits
|x . v|; the four best go through a softmax at temperature 1; A and B are averaged by these weights, each for itself,
and x A B alpha / rank is added to the layer's output.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft_config import new_config
from lorary.lora.targets import find_targets
from lorary.model.attach import routing

Make = Callable[..., Any]
Array = NDArray[np.float64]
IDS = torch.randint(1, 300, (2, 8), generator=torch.Generator().manual_seed(2))
TIED = ("q_proj", "k_proj", "v_proj")
RANK, ALPHA = 4, 2.0
# By name: for which layers lora_b is zero. 'f' does nothing at all, 'd' nothing in its queries.
ZEROS: dict[str, tuple[str, ...]] = {
    "a": (), "b": (), "c": (), "d": ("q_proj",), "e": ("o_proj",), "f": (*TIED, "o_proj"),
}  # fmt: skip


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def experts(model: Any, generator: torch.Generator) -> list[Adapter]:
    """Experts whose q, k and v share one lora_a, as the paper's did."""
    shapes, made = find_targets(model, (*TIED, "o_proj")), []
    for name, zeros in ZEROS.items():
        modules, shared = {}, {}
        for path, (d_in, d_out) in shapes.items():
            parent, _, last = path.rpartition(".")
            key = (parent, last not in TIED)
            lora_a = shared.setdefault(key, torch.randn(RANK, d_in, generator=generator, dtype=torch.float64))
            lora_b = torch.randn(d_out, RANK, generator=generator, dtype=torch.float64) * (last not in zeros)
            modules[path] = LoraFactors(lora_a, lora_b, ALPHA / RANK)
        config = new_config(None, rank=RANK, alpha=ALPHA, target_modules=sorted(shapes))
        made.append(Adapter(name, modules, config))
    return made


def first_direction(a: Array, b: Array) -> Array:
    """v of one expert, by the SVD of the whole product."""
    product = a @ b
    left: Array = np.linalg.svd(product if product.any() else a, full_matrices=False)[0]
    return left[:, 0]


def layer_output(x: Array, factors: list[tuple[Array, Array]], prototypes: list[Array]) -> Array:
    """What the experts add for one token."""
    scores = np.array([abs(x @ v) for v in prototypes])
    best = np.argsort(-scores)[:4]
    shares = np.exp(scores[best] - scores[best].max())
    shares /= shares.sum()
    a = sum(w * factors[e][0] for w, e in zip(shares, best, strict=True))
    b = sum(w * factors[e][1] for w, e in zip(shares, best, strict=True))
    added: Array = (x @ a @ b) * (ALPHA / RANK)
    return added


def by_the_recipe(model: Any, adapters: list[Adapter]) -> Tensor:
    def turned(adapter: Adapter, path: str) -> tuple[Array, Array]:
        factors = adapter.modules[path]
        return factors.lora_a.mT.numpy(), factors.lora_b.mT.numpy()

    def routed(path: str) -> Callable[..., Tensor]:
        parent, _, last = path.rpartition(".")
        tied = [f"{parent}.{name}" for name in TIED] if last in TIED else [path]
        factors = [turned(adapter, path) for adapter in adapters]
        prototypes = [
            first_direction(turned(adapter, path)[0], np.concatenate([turned(adapter, p)[1] for p in tied], axis=1))
            for adapter in adapters
        ]

        def hook(_layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows = [layer_output(x, factors, prototypes) for x in args[0].flatten(0, 1).numpy()]
            return output + torch.from_numpy(np.stack(rows)).view(output.shape)

        return hook

    for path in adapters[0].modules:
        model.get_submodule(path).register_forward_hook(routed(path))
    return logits(model)


def test_the_preset_equals_the_recipe_of_the_paper(tiny_model: Make, route: Make, generator: torch.Generator) -> None:
    adapters = experts(tiny_model(dtype=torch.float64), generator)
    expected = by_the_recipe(tiny_model(dtype=torch.float64), adapters)
    model = route(tiny_model(dtype=torch.float64), adapters, preset="paper-2024")
    with routing(model, "base"):
        effect = float((expected - logits(model)).abs().max())
    assert effect > 0.1
    assert float((logits(model) - expected).abs().max()) < 1e-6 * effect


@pytest.mark.parametrize("other", [{"tie": "none"}, {"zeros": "skip"}, {"mix": "outputs"}, {"top_k": 3}])
def test_each_part_of_the_preset_is_needed(
    tiny_model: Make, route: Make, generator: torch.Generator, other: dict[str, Any]
) -> None:
    adapters = experts(tiny_model(dtype=torch.float64), generator)
    expected = by_the_recipe(tiny_model(dtype=torch.float64), adapters)
    model = route(tiny_model(dtype=torch.float64), adapters, preset="paper-2024")
    with routing(model, {"preset": "paper-2024", **other}):
        assert float((logits(model) - expected).abs().max()) > 1e-3
