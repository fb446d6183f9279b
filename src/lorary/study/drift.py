"""A drift stage: what another seed, or other data, do to prototypes and to clusters."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from lorary.axes import layer_number
from lorary.cluster.agreement import agreement
from lorary.cluster.mbc import cluster_adapters
from lorary.errors import LibraryError
from lorary.library.store import Library
from lorary.route.arrow import arrow_prototypes
from lorary.study.config import DriftStage, identity
from lorary.study.context import Place
from lorary.study.record import write_document


def run_drift_stage(place: Place, stage: DriftStage, key: str) -> str:
    """Compare two libraries of experts by the same names, and keep what was found.

    Returns:
        A line on what was found.

    Raises:
        LibraryError: if they share no expert.
    """
    one, other = (Library.open(place.library(name)) for name in (stage.library, stage.against))
    names = sorted(set(one.names()) & set(other.names()))
    if not names:
        raise LibraryError(f"libraries {stage.library} and {stage.against} must share experts", found="none")
    cosines: dict[str, dict[str, float]] = {}
    with place.display.bar("comparing prototypes", len(names)) as bar:
        for name in names:
            cosines[name] = prototype_cosines(one, other, name)
            bar.advance(name)
    found = {
        "key": key,
        "library": stage.library,
        "against": stage.against,
        "experts": names,
        **summary(cosines),
        "clusters": _clusters(stage, one, other, names) if stage.k else None,
    }
    write_document(place.results(identity(stage)), found)
    return f"prototypes of {len(names)} experts: mean |cosine| {found['cosine']:.3f}"


def prototype_cosines(one: Library, other: Library, name: str) -> dict[str, float]:
    """|cosine| of an expert's Arrow prototypes in two libraries, by layer; a layer that computes nothing counts 0."""
    ours, theirs = one.get(name).modules, other.get(name).modules
    found = {}
    for path in sorted(set(ours) & set(theirs)):
        (first, _), (second, _) = (arrow_prototypes(m[path].lora_a[None], m[path].lora_b[None]) for m in (ours, theirs))
        found[path] = float((first @ second.mT).abs())
    return found


def summary(cosines: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Means over experts, of all layers, by the kind of layer and by its depth.

    Args:
        cosines: by expert, then by path of the layer.
    """
    rows = [(path, value) for own in cosines.values() for path, value in own.items()]

    def means(label: Any) -> dict[str, float]:
        labels = sorted({label(path) for path, _ in rows})
        return {str(one): mean(value for path, value in rows if label(path) == one) for one in labels}

    return {
        "cosine": mean(value for _, value in rows),
        "by_module": means(lambda path: path.rsplit(".", 1)[-1]),
        "by_layer": means(lambda path: layer_number(path) or 0),
        "by_expert": {name: mean(own.values()) for name, own in cosines.items()},
    }


def _clusters(stage: DriftStage, one: Library, other: Library, names: list[str]) -> dict[str, Any]:
    labels = [cluster_adapters(names, lib.get, k=stage.k, seed=stage.seed).labels for lib in (one, other)]
    return {"k": stage.k, "seed": stage.seed, **agreement(*labels)._asdict()}
