"""Adapters of a library become one adapter, without data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorary.adapt.merge_settings import MEANS, MergeSettings
from lorary.adapt.pool import Pool, pool_of
from lorary.adapt.settings import MU, AdaptSettings
from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError, LibraryError
from lorary.formats.peft_patterns import new_adapter
from lorary.library.store import Library
from lorary.merge.catalogue import merge_adapters


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter made of several, and how.

    Args:
        adapter: the result.
        parents: names of the adapters that went into it.
        rank: the largest rank over its layers.
        error: what truncation left out, relative to the whole update, in the Frobenius norm.
        errors: the same for each layer, by its path.
        partial: by name of an adapter, how many of the merged layers it lacks: its update there counts as zero.
        provenance: what a library records of it, beside what it computes itself.
    """

    adapter: Adapter
    parents: tuple[str, ...]
    rank: int
    error: float
    errors: Mapping[str, float]
    partial: Mapping[str, int]
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
    adapters = {parent: pool.whole(parent) for parent in pool.names}
    equal = 1.0 / len(adapters) if settings.method in MEANS else 1.0
    weights = dict.fromkeys(adapters, equal) if settings.weights is None else settings.weights
    merged = merge_adapters(
        settings.method, adapters, [weights[parent] for parent in adapters], rank=settings.rank, **settings.options
    )
    modules = {path: _scaled(path, factors, settings.scale) for path, factors in merged.modules.items()}
    lacking = {parent: len(modules) - len(layers) for parent, layers in adapters.items()}
    partial = {parent: count for parent, count in lacking.items() if count}
    provenance = {
        "method": f"merge-{settings.method}",
        "tasks": sorted({task for tasks in pool.tasks.values() for task in tasks}),
        "parents": list(pool.hashes.values()),
        "parent_names": list(pool.names),
        "template": template,
        "merge": {
            "weights": None if settings.weights is None else dict(settings.weights),
            "scale": settings.scale,
            "rank": settings.rank,
            **settings.options,
            "layers_that_adapters_lack": partial,
        },
        "metrics": {
            "truncation_error": merged.error,
            "truncation_errors": {path: error for path, error in merged.errors.items() if error},
        },
    }
    adapter = new_adapter(name, modules, library.base.name)
    return MergedAdapter(adapter, pool.names, adapter.rank, merged.error, merged.errors, partial, provenance)


def _scaled(path: str, factors: LoraFactors, scale: float) -> LoraFactors:
    if factors.magnitude is not None and scale != 1:
        raise AdapterError(
            "a DoRA must be given at scale 1: its magnitudes belong to its update as it is",
            found=f"--scale {scale:g} of a DoRA at {path}",
            remedy="leave --scale out, or route to it by that weight",
        )
    bias = None if factors.bias is None else factors.bias * scale
    return replace(factors, lora_b=factors.lora_b * scale, bias=bias)


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
