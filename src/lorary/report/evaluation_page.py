"""The page of an evaluation: one HTML file that opens anywhere, offline, and asks nothing of any network."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from lorary.cluster.similarity import adapter_similarity
from lorary.evaluate.cells import BASE
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.store import Library
from lorary.report.answered_rows import answered_rows
from lorary.report.contents import Report, Similarity
from lorary.report.evidence_plots import gap_plot, heat_plot, routing_shares, sweeps
from lorary.report.example import example
from lorary.report.expert_matrix import expert_matrix
from lorary.report.headline import failure_box, guard_box, headline
from lorary.report.markup import by_name_words, counted, percent, signed
from lorary.report.plots import (
    OTHER,
    closest_pairs,
    family_colours,
    loss_plot,
    means_plot,
    score_plot,
    similarity_plot,
    within_and_between,
)
from lorary.report.shell import Section, page_html, part, write_page
from lorary.report.table import table_section
from lorary.report.table_model import SPLITS, ScoreTable
from lorary.report.traces import routing_plot

SCRIPTS = (
    "core.js", "svg.js", "axes.js", "grid.js", "means.js", "scores.js", "heat.js", "gap.js", "sweep.js",
    "similarity.js", "losses.js", "rows.js", "matrix.js", "routing_map.js", "routing.js", "start.js", "listen.js",
)  # fmt: skip
# Colours in style.css, `--hue-0` and so on.
NUM_HUES = 8
# Shares by chance that are named; tasks differ in it where libraries do.
NUM_CHANCES = 3


def report_of(evaluation: Evaluation, libraries: Sequence[Library], routings: Sequence[RoutedPrompt] = ()) -> Report:
    """The contents of the page.

    Args:
        evaluation: results of the libraries' routers.
        libraries: the libraries, in the evaluation's order; what is shown of experts is shown of the first.
        routings: traced prompts.
    """
    library = libraries[0]
    names = library.names()
    provenances = {name: library.provenance(name) for name in names}
    # Provenance of imported adapters is anybody's: what does not look like ours is left out.
    metrics = {name: _mapping(provenance.get("metrics")) for name, provenance in provenances.items()}
    losses = {
        name: (float(values["val_loss_base"]), float(values["val_loss"]))
        for name, values in metrics.items()
        if all(isinstance(values.get(key), (int, float)) for key in ("val_loss_base", "val_loss"))
    }
    families = {
        name: str(next(iter(_mapping(provenance.get("families")).values()), "other"))
        for name, provenance in provenances.items()
    }
    sizes = {
        ("library" if len(libraries) == 1 else f"library {number}"): f"{name}, {len(opened)} experts"
        for number, (name, opened) in enumerate(zip(evaluation.libraries, libraries, strict=True), start=1)
    }
    settings = evaluation.settings
    return Report(
        title=_title(evaluation),
        facts={
            "base model": evaluation.base,
            **sizes,
            "router settings": _described(settings),
            "prompt template": settings.template,
            **({"tasks by name": words} if (words := by_name_words(evaluation.tasks_by_name)) else {}),
        },
        evaluation=evaluation.to_json(),
        similarity=_similarity(library, families),
        routings=routings,
        losses=losses,
        versions={package: version(package) for package in ("lorary", "torch", "transformers")},
    )


def _similarity(library: Library, families: Mapping[str, str]) -> Similarity | None:
    """How alike the experts are; None where one of them is a DoRA, whose update its factors do not hold."""
    names = library.names()
    adapters = [library.get(name) for name in names]
    if any(factors.magnitude is not None for adapter in adapters for _, factors in adapter):
        return None
    return Similarity(names, families, adapter_similarity(adapters))


def _title(evaluation: Evaluation) -> str:
    routers = {cell.router for cell in evaluation.cells} - {BASE}
    tasks = {cell.task for cell in evaluation.cells}
    return f"{evaluation.library}: {counted(len(routers), 'router')} and the base on {counted(len(tasks), 'task')}"


def _described(settings: EvaluateSettings) -> str:
    temperature = settings.temperature
    shown = "by layer" if isinstance(temperature, Mapping) else f"{temperature:g}"
    further = [f"{key} {value}" for key, value in settings.route.items()]
    for router, fields in settings.units.items():
        further += [f"{key} {value} of {router}" for key, value in fields.items() if key not in settings.route]
    return ", ".join([f"top_k {settings.top_k}", f"temperature {shown}", f"mixing {settings.mix}", *further])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def write_report(path: Path, report: Report) -> None:
    """Write the page, as `write_page` does."""
    write_page(path, render_report(report))


def render_report(report: Report) -> str:
    """The page as one string, as `page_html` makes it."""
    table = ScoreTable(report.evaluation) if report.evaluation else None
    families = [*report.families().values(), *(str(cell["family"]) for cell in report.cells), OTHER]
    colours = family_colours([family for family in families if family != OTHER], NUM_HUES) | {OTHER: NUM_HUES - 1}
    plots = _plot_data(report, table, colours)
    return page_html(report.title, report.facts, _sections(report, table, plots), plots, scripts=SCRIPTS)


def _plot_data(report: Report, table: ScoreTable | None, colours: dict[str, int]) -> dict[str, Any]:
    families = report.families()
    similarity = report.similarity
    scored = table if table and table.primary else None
    return {
        "colours": colours,
        "families": families,
        "means": means_plot(scored) if scored else None,
        "rows": answered_rows(scored) if scored else None,
        "matrix": expert_matrix(scored, families) if scored else None,
        "scores": score_plot(scored) if scored else None,
        "heat": heat_plot(scored) if scored else None,
        "gap": gap_plot(table) if table else [],
        "accuracy": routing_shares(table) if table else None,
        "sweeps": sweeps(table) if table else [],
        "similarity": similarity_plot(similarity) if similarity and similarity.names else None,
        "routings": [routing_plot(routed) for routed in report.routings],
        "losses": loss_plot(report.losses, families),
    }


def _sections(report: Report, table: ScoreTable | None, plots: Mapping[str, Any]) -> list[Section]:
    """The sections that the report has something for, in the order in which they are read."""
    sections: list[Section] = []

    def add(key: str, title: str, *values: Any) -> None:
        sections.append((key, title, part("evaluation.html", key, *values)))

    if table and table.primary:
        lead = headline(table, example(report.routings))
        sections.append(("result", "Result", lead + failure_box(table) + guard_box(table)))
        sections.append(("table", "Every task", table_section(table, plots["colours"])))
        add("heat", "Heat map")
        if plots["matrix"]:
            add("matrix", "Experts and tasks", {view["kind"] for view in plots["matrix"]["views"]})
        add("families", "By family")
        if table.gaps:
            add("gap", "From the base to the oracle", _without_gap(table), bool(plots["gap"]))
        if table.routing:
            add("accuracy", "Routing to the right expert", *_routing_shares(table))
        if plots["sweeps"]:
            add("sweeps", "One setting varied", len(plots["sweeps"]))
        if plots["rows"]:
            add("rows", "Every row", plots["rows"]["most"])
    elif table and table.failures:
        sections.append(("result", "Result", failure_box(table)))
    if plots["similarity"]:
        assert report.similarity is not None
        means = zip(within_and_between(report.similarity), ("inside a family", "between families"), strict=True)
        shown = [(mean, where) for mean, where in means if mean is not None]
        count = len(report.similarity.names)
        add("similarity", "How alike the experts are", shown, closest_pairs(report.similarity), count)
    if report.routings:
        add("routing", "Where the tokens go")
    if report.losses:
        add("losses", "Validation losses", *_losses(report.losses))
    add("reading", "How to read this page", table is not None or bool(report.routings), report.versions)
    return sections


def _without_gap(table: ScoreTable) -> list[str]:
    """Where the oracle is not clearly better than the base."""
    described = (
        f"on {SPLITS[gap['split']]} tasks ({signed(gap['gap'])} points over {counted(gap['tasks'], 'task')})"
        for gap in table.gaps
        if gap["closed"] is None
    )
    return list(dict.fromkeys(described))


def _routing_shares(table: ScoreTable) -> tuple[str, float, list[str]]:
    """The router with the largest share, this, and the shares that chance gives."""
    shares = {mean["router"]: mean["share"] for mean in table.routing_means if mean["family"] is None}
    best = max(shares, key=lambda router: shares[router])
    chances = sorted({round(row["chance"], 4) for row in table.routing})
    return best, shares[best], [percent(chance) for chance in chances[:NUM_CHANCES]]


def _losses(losses: Mapping[str, tuple[float, float]]) -> tuple[int, int, float | None, list[str]]:
    """How many experts are better than the base, of how many, by what median, and the names of the others."""
    gains = {name: base - expert for name, (base, expert) in losses.items()}
    better: list[float] = [gain for gain in gains.values() if gain > 0]
    worse = sorted(name for name, gain in gains.items() if gain <= 0)
    return len(better), len(losses), median(better) if better else None, worse
