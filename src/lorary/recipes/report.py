"""The page of an evaluation: what was found, which adapters are alike, and where a prompt's tokens went."""

from collections.abc import Sequence
from importlib.metadata import version

from lorary.cluster.similarity import adapter_similarity
from lorary.evaluate.report import Report, RoutedPrompt, Similarity
from lorary.library.store import Library
from lorary.recipes.evaluate import Evaluation


def report_of(evaluation: Evaluation, library: Library, routings: Sequence[RoutedPrompt] = ()) -> Report:
    """Gather what a page shows.

    Args:
        evaluation: results of the library's routers.
        library: the library.
        routings: traced prompts.

    Returns:
        The contents of the page, for `lorary.evaluate.report.write_report`.
    """
    names = library.names()
    known = {name: library.provenance(name) for name in names}
    losses = {
        name: (provenance["metrics"]["val_loss_base"], provenance["metrics"]["val_loss"])
        for name, provenance in known.items()
        if "val_loss_base" in provenance.get("metrics", {})
    }
    families = {
        name: next(iter(provenance.get("families", {}).values()), "other") for name, provenance in known.items()
    }
    settings = evaluation.settings
    facts = {
        "base model": evaluation.base,
        "library": f"{evaluation.library}, {len(names)} experts",
        "router settings": f"top_k {settings.top_k}, temperature {settings.temperature:g}, mixing {settings.mix}",
        "prompt template": settings.template,
    }
    return Report(
        title=f"Lorary: {evaluation.library}",
        facts=facts,
        evaluation=evaluation.to_json(),
        similarity=Similarity(names, families, adapter_similarity([library.get(name) for name in names])),
        routings=routings,
        losses=losses,
        versions={package: version(package) for package in ("lorary", "torch", "transformers")},
    )
