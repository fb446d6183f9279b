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
from lorary.study.context import StudyContext
from lorary.study.record import write_document


def run_drift_stage(context: StudyContext, stage: DriftStage, key: str) -> str:
    """Compare two libraries of experts by the same names, and keep what was found.

    Returns:
        A line on what was found.

    Raises:
        LibraryError: if they share no expert.
    """
    library, against = (Library.open(context.library(name)) for name in (stage.library, stage.against))
    names = sorted(set(library.names()) & set(against.names()))
    if not names:
        raise LibraryError(f"libraries {stage.library} and {stage.against} must share experts", found="none")
    cosines: dict[str, dict[str, float]] = {}
    with context.display.bar("comparing prototypes", len(names)) as bar:
        for name in names:
            cosines[name] = prototype_cosines(library, against, name)
            bar.advance(name)
    document = {
        "key": key,
        "library": stage.library,
        "against": stage.against,
        "experts": names,
        **summary(cosines),
        "clusters": _clusters(stage, library, against, names) if stage.k else None,
    }
    write_document(context.results(identity(stage)), document)
    return f"prototypes of {len(names)} experts: mean |cosine| {document['cosine']:.3f}"


def prototype_cosines(library: Library, against: Library, name: str) -> dict[str, float]:
    """|cosine| of an expert's Arrow prototypes in two libraries, by layer; a layer that computes nothing counts 0."""
    modules, other_modules = library.get(name).modules, against.get(name).modules
    cosines = {}
    for path in sorted(set(modules) & set(other_modules)):
        (first, _), (second, _) = (
            arrow_prototypes(m[path].lora_a[None], m[path].lora_b[None]) for m in (modules, other_modules)
        )
        cosines[path] = float((first @ second.mT).abs())
    return cosines


def summary(cosines: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Means of cosines (by expert and path of the layer): of all, by kind and by depth of the layer, by expert."""
    values = [entry for by_path in cosines.values() for entry in by_path.items()]

    def means(label: Any) -> dict[str, float]:
        labels = sorted({label(path) for path, _ in values})
        return {str(kind): mean(value for path, value in values if label(path) == kind) for kind in labels}

    return {
        "cosine": mean(value for _, value in values),
        "by_module": means(lambda path: path.rsplit(".", 1)[-1]),
        "by_layer": means(lambda path: layer_number(path) or 0),
        "by_expert": {name: mean(by_path.values()) for name, by_path in cosines.items()},
    }


def _clusters(stage: DriftStage, library: Library, against: Library, names: list[str]) -> dict[str, Any]:
    labels = [cluster_adapters(names, source.get, k=stage.k, seed=stage.seed).labels for source in (library, against)]
    return {"k": stage.k, "seed": stage.seed, **agreement(*labels)._asdict()}
