"""Similarity of adapters is the cosine between their whole updates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.cluster.similarity import adapter_similarity

Make = Callable[..., Any]


def whole_update(adapter: Adapter, model: Any) -> Tensor:
    """The update of all layers as one vector; zeros where the adapter has none."""
    parts = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            factors = adapter.modules.get(path)
            update = torch.zeros_like(module.weight) if factors is None else factors.delta()
            parts.append(update.double().flatten())
    return torch.cat(parts)


def test_similarity_is_the_cosine_of_the_whole_updates(
    tiny_model: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    model = tiny_model(dtype=torch.float64)
    first = random_adapter(model, "a", generator)
    mixed = {path: LoraFactors(f.lora_a, f.lora_b + 0.3, f.scaling / 3) for path, f in first}
    adapters = [
        first,
        replace(first, name="near", modules=mixed),
        random_adapter(model, "b", generator, rank=2, layers=[0]),
        random_adapter(model, "c", generator, rank=5, targets=("q_proj", "up_proj")),
    ]
    updates = torch.stack([whole_update(adapter, model) for adapter in adapters])
    normal = updates / updates.norm(dim=1, keepdim=True)
    found = adapter_similarity(adapters)
    assert torch.allclose(found, normal @ normal.mT, atol=1e-12)
    assert 0.2 < found[0, 1] < 0.999
    assert torch.equal(found, found.mT)


def test_an_adapter_that_computes_nothing_is_similar_to_none(
    tiny_model: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    model = tiny_model()
    adapters = [random_adapter(model, "a", generator), random_adapter(model, "zero", generator, size=0.0)]
    assert adapter_similarity(adapters).tolist() == [[1, 0], [0, 1]]


def test_equal_updates_in_other_factors_have_similarity_one(
    tiny_model: Make, random_adapter: Make, generator: torch.Generator
) -> None:
    adapter = random_adapter(tiny_model(), "a", generator)
    other = {path: LoraFactors(4 * f.lora_a.flip(0), f.lora_b.flip(1), f.scaling) for path, f in adapter}
    found = adapter_similarity([adapter, replace(adapter, name="b", modules=other)])
    assert torch.allclose(found, torch.ones(2, 2, dtype=torch.float64), atol=1e-12)
