"""All ways to merge adapters, by name: what each works on, and how the layers of adapters go through it."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorary.adapter import LoraFactors, check_low_rank
from lorary.merge.core_space import core_space, factors_of_core
from lorary.merge.dare import dare, dare_ties
from lorary.merge.isotropic import iso_c, iso_cts
from lorary.merge.layers import MixedLayer, Modules, mixed_layers
from lorary.merge.linear import linear
from lorary.merge.pico import pico
from lorary.merge.prune import prune
from lorary.merge.sums import mean_factors, weighted_sum
from lorary.merge.ties import ties, ties_factors
from lorary.merge.truncate import Closest, Truncated, closest_of_rank, truncate, with_errors
from lorary.merge.tsv import tsv


@dataclass(frozen=True)
class InCore:
    """A method on the experts' updates of one layer as small matrices in the space that they share.

    Args:
        merge: (cores (experts, p, q), weights, **options) to a (p, q) matrix.
    """

    merge: Callable[..., Tensor]


@dataclass(frozen=True)
class OnUpdates:
    """A method on the entries of the experts' full updates of one layer; its result is truncated.

    Args:
        merge: (updates (experts, d_out, d_in), weights, **options) to a (d_out, d_in) matrix.
        is_random: it takes `generators`.
    """

    merge: Callable[..., Tensor]
    is_random: bool = False


@dataclass(frozen=True)
class OnFactors:
    """A method that puts factors together, of all layers.

    Args:
        merge: (adapters, weights, **options) to factors by path; without weights where it `has_weights` not.
        has_weights: whether it takes weights.
    """

    merge: Callable[..., Mapping[str, LoraFactors]]
    has_weights: bool = True


METHODS: Mapping[str, InCore | OnUpdates | OnFactors] = {
    "mean": OnFactors(weighted_sum),
    "concat": OnFactors(weighted_sum),
    "mu": OnFactors(mean_factors),
    "linear": OnFactors(linear),
    "ties-factors": OnFactors(ties_factors, has_weights=False),
    "prune": OnUpdates(prune),
    "ties": OnUpdates(ties),
    "dare": OnUpdates(dare, is_random=True),
    "dare-ties": OnUpdates(dare_ties, is_random=True),
    "core-ties": InCore(ties),
    "tsv": InCore(tsv),
    "iso-c": InCore(iso_c),
    "iso-cts": InCore(iso_cts),
    "pico": InCore(pico),
}


# Those that sum updates, whatever they are: the biases beside them add up likewise.
SUMS = ("mean", "concat")


def merge_adapters(
    method: str,
    adapters: Mapping[str, Modules],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Truncated:
    """Merge adapters layer by layer; a layer that an adapter lacks is an update of zero.

    Args:
        method: a key of `METHODS`.
        adapters: factors by path, by the name of each adapter.
        weights: one for each.
        rank: the largest to keep. Where None, the result keeps all it has; a full update keeps the sum of the ranks
            that went into it.
        seed: of methods that draw.
        options: what the method takes beside these: density, common or strength.

    Returns:
        Factors by path, and what the rank left out of them.

    Raises:
        AdapterError: if shapes differ, or ranks where factors are summed; or if an adapter has a bias or a magnitude
            (DoRA) beside its factors, except for sums, which take biases, and one DoRA alone as it is.
    """
    by_adapter = torch.tensor(list(weights), dtype=torch.float64)
    if method in SUMS and rank is None and _is_one_dora(adapters) and float(by_adapter[0]) == 1:
        (alone,) = adapters.values()
        return Truncated(dict(alone), 0.0, dict.fromkeys(alone, 0.0))
    _check_parts(method, adapters)
    way, modules = METHODS[method], list(adapters.values())
    if isinstance(way, OnUpdates):
        return _on_updates(way, adapters, by_adapter, rank, seed, options)
    if isinstance(way, OnFactors):
        whole = dict(way.merge(modules, *((by_adapter,) if way.has_weights else ()), **options))
    else:
        whole = {path: _in_core(way, layer, by_adapter, options) for path, layer in mixed_layers(modules).items()}
    largest = max(factors.rank for factors in whole.values())
    return truncate(whole, rank or largest, next(iter(whole.values())).scaling)


def _has_magnitude(modules: Modules) -> bool:
    return any(factors.magnitude is not None for factors in modules.values())


def _is_one_dora(adapters: Mapping[str, Modules]) -> bool:
    return len(adapters) == 1 and all(map(_has_magnitude, adapters.values()))


def _check_parts(method: str, adapters: Mapping[str, Modules]) -> None:
    """Refuse adapters with parts beside their factors that a method would leave out."""
    for name, modules in adapters.items():
        alone = "give it alone, at weight 1 and without --rank, or route to it"
        remedy = alone if _has_magnitude(modules) else "merge it by concat or mean, which sum biases"
        check_low_rank(name, modules, f"be merged by '{method}'", remedy=remedy, may_have_bias=method in SUMS)


def _in_core(way: InCore, layer: MixedLayer, weights: Tensor, options: Mapping[str, Any]) -> LoraFactors:
    space = core_space(layer)
    factors = factors_of_core(way.merge(space.cores, weights[list(layer.members)], **options), space)
    dtype = layer.factors[0].lora_a.dtype
    return LoraFactors(factors.lora_a.to(dtype), factors.lora_b.to(dtype), factors.scaling)


def _on_updates(
    way: OnUpdates,
    adapters: Mapping[str, Modules],
    weights: Tensor,
    rank: int | None,
    seed: int,
    options: Mapping[str, Any],
) -> Truncated:
    names, layers = list(adapters), dict[str, Closest]()
    for path, layer in mixed_layers(list(adapters.values())).items():
        updates = torch.stack([factors.delta() for factors in layer.factors])
        drawn = {}
        if way.is_random:
            drawn["generators"] = [_generator(seed, path, names[member]) for member in layer.members]
        update = way.merge(updates, weights[list(layer.members)].to(updates), **options, **drawn)
        layers[path] = closest_of_rank(update, rank or layer.num_ranks)
    return with_errors(layers)


def _generator(seed: int, path: str, name: str) -> torch.Generator:
    """Draws that depend on the layer and the adapter alone, not on which others are merged."""
    digest = hashlib.sha256(f"{seed}\n{path}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
