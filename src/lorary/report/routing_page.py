"""The page of an evaluation: what was found, which adapters are alike, and where a prompt's tokens went."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lorary.cluster.similarity import adapter_similarity
from lorary.evaluate.cells import BASE
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.store import Library
from lorary.report.contents import Report, Similarity
from lorary.report.markup import counted


def report_of(evaluation: Evaluation, libraries: Sequence[Library], routings: Sequence[RoutedPrompt] = ()) -> Report:
    """Gather what a page shows.

    Args:
        evaluation: results of the libraries' routers.
        libraries: the libraries, in the evaluation's order; what is shown of experts is shown of the first.
        routings: traced prompts.

    Returns:
        The contents of the page, for `lorary.report.evaluation_page.write_report`.
    """
    library = libraries[0]
    names = library.names()
    known = {name: library.provenance(name) for name in names}
    # Provenance of imported adapters is anybody's: what does not look like ours is left out.
    metrics = {name: _mapping(provenance.get("metrics")) for name, provenance in known.items()}
    losses = {
        name: (float(own["val_loss_base"]), float(own["val_loss"]))
        for name, own in metrics.items()
        if all(isinstance(own.get(key), (int, float)) for key in ("val_loss_base", "val_loss"))
    }
    families = {
        name: str(next(iter(_mapping(provenance.get("families")).values()), "other"))
        for name, provenance in known.items()
    }
    settings = evaluation.settings
    facts = {
        "base model": evaluation.base,
        **{
            ("library" if len(libraries) == 1 else f"library {number}"): f"{name}, {len(own)} experts"
            for number, (name, own) in enumerate(zip(evaluation.libraries, libraries, strict=True), start=1)
        },
        "router settings": _described(settings),
        "prompt template": settings.template,
    }
    return Report(
        title=_title(evaluation),
        facts=facts,
        evaluation=evaluation.to_json(),
        similarity=Similarity(names, families, adapter_similarity([library.get(name) for name in names])),
        routings=routings,
        losses=losses,
        versions={package: version(package) for package in ("lorary", "torch", "transformers")},
    )


def _title(evaluation: Evaluation) -> str:
    """What the page shows."""
    routers = {cell.router for cell in evaluation.cells} - {BASE}
    tasks = {cell.task for cell in evaluation.cells}
    return f"{evaluation.library}: {counted(len(routers), 'router')} and the base on {counted(len(tasks), 'task')}"


def _described(settings: EvaluateSettings) -> str:
    temperature = settings.temperature
    shown = "by layer" if isinstance(temperature, Mapping) else f"{temperature:g}"
    further = [f"{key} {value}" for key, value in settings.route.items()]
    for router, own in settings.units.items():
        further += [f"{key} {value} of {router}" for key, value in own.items() if key not in settings.route]
    return ", ".join([f"top_k {settings.top_k}", f"temperature {shown}", f"mixing {settings.mix}", *further])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
