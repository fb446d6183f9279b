"""Adapters of a library become one adapter, without data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorary.adapt.merge_settings import CONCAT, FACTORS, TIES, MergeSettings
from lorary.adapt.pool import Pool, pool_of
from lorary.adapt.settings import MU, AdaptSettings
from lorary.adapter import Adapter, LoraFactors
from lorary.errors import LibraryError
from lorary.formats.peft_patterns import new_adapter
from lorary.library.store import Library
from lorary.merge.layers import Modules, mixed_layers
from lorary.merge.sums import sum_factors, sum_updates
from lorary.merge.ties import DENSITY, ties
from lorary.merge.truncate import truncate


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter made of several, and how.

    Args:
        adapter: the result.
        parents: names of the adapters that went into it.
        rank: the largest rank over its layers.
        error: what truncation left out, relative to the whole update, in the Frobenius norm.
        provenance: what a library records of it, beside what it computes itself.
    """

    adapter: Adapter
    parents: tuple[str, ...]
    rank: int
    error: float
    provenance: Mapping[str, Any]


def merge_library(library: Library, settings: MergeSettings, *, name: str = "merged") -> MergedAdapter:
    """Merge adapters of a library.

    Args:
        library: that holds them.
        settings: which of them, and how.
        name: of the result.

    Returns:
        The adapter, and what was left out of it.

    Raises:
        UsageError: if an adapter is named twice.
        LibraryError: if an adapter is not in the library, or adapters were trained with different templates.
        AdapterError: if the adapters do not fit each other.
    """
    pool = pool_of(library, AdaptSettings(MU, experts=settings.names))
    template = _template_of(pool)
    adapters = [pool.get(parent) for parent in pool.names]
    weights = settings.weights
    whole = _merge(settings.method, adapters, None if weights is None else [weights[parent] for parent in pool.names])
    largest = max(factors.rank for factors in whole.values())
    truncated = truncate(whole, settings.rank or largest, next(iter(whole.values())).scaling)
    provenance = {
        "method": f"merge-{settings.method}",
        "tasks": sorted({task for tasks in pool.tasks.values() for task in tasks}),
        "parents": list(pool.hashes.values()),
        "parent_names": list(pool.names),
        "template": template,
        "merge": {
            "weights": None if weights is None else dict(weights),
            "rank": settings.rank,
            "density": DENSITY if settings.method == TIES else None,
        },
        "metrics": {"truncation_error": truncated.error},
    }
    adapter = new_adapter(name, truncated.modules, library.base.name)
    rank = min(settings.rank or largest, largest)
    return MergedAdapter(adapter, pool.names, rank, truncated.error, provenance)


def _template_of(pool: Pool) -> str:
    """The template that the adapters were trained with, or plain where none says."""
    trained: dict[str, str] = {}
    for name in pool.names:
        template = pool.library.provenance(name).get("template")
        if template is not None:
            trained.setdefault(str(template), name)
    if len(trained) > 1:
        raise LibraryError(
            "adapters must have been trained with one template to be merged",
            found=", ".join(f"'{name}' with {template}" for template, name in sorted(trained.items())),
            remedy="name adapters of one template with --experts or --weights",
        )
    return next(iter(trained), "plain")


def _merge(method: str, adapters: Sequence[Modules], weights: Sequence[float] | None) -> Modules:
    if method == TIES:
        return ties(adapters)
    equal = 1.0 if method == CONCAT else 1.0 / len(adapters)
    by_adapter = torch.tensor([equal] * len(adapters) if weights is None else list(weights), dtype=torch.float64)
    by_layer: dict[str, Tensor] = {
        path: by_adapter[list(layer.members)] for path, layer in mixed_layers(adapters).items()
    }
    if method != FACTORS:
        return sum_updates(adapters, by_layer)
    # The product of two sums is of the second degree in the weights: their sum is taken out, and put in once.
    total = 1.0 if weights is None else float(by_adapter.sum()) or 1.0
    summed = sum_factors(adapters, {path: layer_weights / total for path, layer_weights in by_layer.items()})
    return {path: LoraFactors(each.lora_a, each.lora_b * total, each.scaling) for path, each in summed.items()}
