"""`lorary merge`: adapters of a library become one adapter in a folder of its own, without data."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorary.adapt.pool import Pool, pool_of
from lorary.adapt.settings import MU, AdaptSettings
from lorary.adapter import LoraFactors
from lorary.errors import LibraryError, UsageError
from lorary.formats.peft import encode_adapter
from lorary.formats.peft_patterns import new_adapter
from lorary.library.files import encode_json, reported, write_folder
from lorary.library.layout import PROVENANCE_FILE
from lorary.library.provenance import new_provenance
from lorary.library.store import Library
from lorary.merge.layers import Modules, mixed_layers
from lorary.merge.sums import sum_factors, sum_updates
from lorary.merge.ties import DENSITY, ties
from lorary.merge.truncate import truncate
from lorary.numbers import check_count, is_number, shown
from lorary.route.setting import MOST_WEIGHT

MEAN, CONCAT, FACTORS, TIES = "mean", "concat", "mu", "ties"
MERGES = (MEAN, CONCAT, FACTORS, TIES)


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Args:
        adapter: the folder it lies in.
        method: one of `MERGES`.
        parents: names of the adapters that went into it.
        rank: the largest rank over its layers.
        error: what truncation left out, relative to the whole update, in the Frobenius norm.
    """

    adapter: str
    method: str
    parents: list[str]
    rank: int
    error: float


def run_merge(
    library_path: str,
    out: str,
    method: str = MEAN,
    *,
    experts: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
) -> MergeResult:
    """Merge adapters of a library.

    Args:
        library_path: folder of the library.
        out: folder of the result, which must not exist.
        method: `mean` or `concat` (the mean or the sum of the updates), `mu` (the mean of the factors), `ties`.
        experts: those to merge; where None all but results of adaptations.
        weights: by name, in place of equal ones, for all but `ties`; they name the experts. For `mu` they are of one
            sign: the mean of the factors by their shares, times their sum.
        rank: the largest to keep; where None, that which the method gives.

    Returns:
        Where the result lies, and what was left out of it.

    Raises:
        UsageError: if an option makes no sense, or something is in the folder's place.
        LibraryError: if an adapter is not in the library, or adapters were trained with different templates.
        AdapterError: if the adapters do not fit each other.
    """
    if method not in MERGES:
        raise UsageError(f"--method must be one of {', '.join(MERGES)}", found=method)
    if weights is not None and (method == TIES or experts is not None):
        raise UsageError("--weights names the adapters itself, and TIES has none", found="--experts or --method ties")
    for name, weight in (weights or {}).items():
        if not (is_number(weight) and abs(weight) <= MOST_WEIGHT):
            raise UsageError(f"--weights must be numbers, {MOST_WEIGHT:g} at most", found=f"{name}={shown(weight)}")
    if method == FACTORS and weights is not None and len({weight > 0 for weight in weights.values() if weight}) > 1:
        raise UsageError(
            "--weights of mu must be of one sign: a sum of factors cannot take an update away",
            found=", ".join(f"{name}={weight:g}" for name, weight in weights.items()),
            remedy="use --method mean, which sums updates",
        )
    if rank is not None:
        check_count("--rank", rank, above=0)
    folder = Path(out)
    if folder.exists():
        raise UsageError("--out must be a new folder", found=f"{out} exists", remedy="name another one")
    library = Library.open(library_path)
    named = tuple(weights) if weights is not None else None if experts is None else tuple(experts)
    pool = pool_of(library, AdaptSettings(MU, experts=named))
    template = _template_of(pool)
    adapters = [pool.get(name) for name in pool.names]
    whole = _merge(method, adapters, None if weights is None else [weights[name] for name in pool.names])
    largest = max(factors.rank for factors in whole.values())
    truncated = truncate(whole, rank or largest, next(iter(whole.values())).scaling)
    density = DENSITY if method == TIES else None
    options = {"weights": None if weights is None else dict(weights), "rank": rank, "density": density}
    _write(folder, truncated.modules, method, pool, {"template": template, "merge": options, "error": truncated.error})
    return MergeResult(str(folder), method, list(pool.names), min(rank or largest, largest), truncated.error)


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
    shares = {path: layer_weights / total for path, layer_weights in by_layer.items()}
    summed = sum_factors(adapters, shares)
    return {path: LoraFactors(f.lora_a, f.lora_b * total, f.scaling) for path, f in summed.items()}


def _write(folder: Path, modules: Modules, method: str, pool: Pool, options: Mapping[str, Any]) -> None:
    """The folder as a library would hold it, so that `lorary library add` takes its history along; whole or not."""
    record = pool.library.base
    adapter = new_adapter(folder.name, modules, record.name)
    files = encode_adapter(adapter)
    details = {
        "method": f"merge-{method}",
        "tasks": sorted({task for tasks in pool.tasks.values() for task in tasks}),
        "parents": list(pool.hashes.values()),
        "parent_names": list(pool.names),
        "template": options["template"],
        "merge": options["merge"],
        "metrics": {"truncation_error": options["error"]},
    }
    base = {"name": record.name, "fingerprint": record.fingerprint.digest}
    provenance = new_provenance(adapter, files, base, details)
    try:
        with reported(folder.parent):
            # A kill leaves the other name at most, and the next try begins anew.
            part = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(part, ignore_errors=True)
            write_folder(part, {**files, PROVENANCE_FILE: encode_json(provenance)})
            os.rename(part, folder)
    except LibraryError as failed:
        raise UsageError(f"--out must be a folder that can be made: {folder}", found=failed.found) from failed
