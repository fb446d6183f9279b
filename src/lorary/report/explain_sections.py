"""The sections of an explanation as HTML; all of it says its numbers without a script."""

from lorary.evaluate.explanation import Explanation
from lorary.lora.targets import place_of
from lorary.report.asset import asset
from lorary.report.explain_map import NUM_KEPT, colour_of, column_names, usage_map
from lorary.report.explain_measures import (
    agreement_section,
    entropy_section,
    experts_section,
    worth_section,
)
from lorary.report.explain_strip import prompts_section, undecided_section
from lorary.report.markup import text
from lorary.report.traces import ALL

Section = tuple[str, str, str]


def sections(explanation: Explanation) -> list[Section]:
    """All sections that there is something for, in the order in which they are read.

    Args:
        explanation: what was seen.

    Returns:
        Identifier, title and HTML of each.
    """
    e = explanation
    made: list[Section] = [
        ("tokens", "Where the tokens went", prompts_section(e) if e.decides else undecided_section(e))
    ]
    if e.decides:
        made.append(("map", "Layers and experts", _map(e)))
        made.append(("experts", "Experts", experts_section(e)))
    made.append(("worth", "What the answers owe to each expert", worth_section(e)))
    if e.decides:
        made.append(("entropy", "How widely tokens are shared", entropy_section(e)))
    if e.against:
        made.append(("agreement", f"Beside {text(e.against[0])}", agreement_section(e)))
    return [*made, ("reading", "How to read this page", asset("explain.html"))]


def _map(e: Explanation) -> str:
    kinds = {place_of(path)[0] for path in e.layers}
    rows = usage_map(e, ALL if len(kinds) > 1 else next(iter(kinds)))
    peak = max((value for row in rows for value in row if value), default=0.0) or 1.0
    heads = "".join(
        f'<th scope="col" style="--c:{colour_of(rank)}"><span>{text(name)}</span></th>'
        for rank, name in enumerate(column_names(e))
    )
    body = "".join(
        f'<tr><th scope="row">{text(group.name)}</th>{"".join(_cell(value, peak) for value in row)}</tr>'
        for group, row in zip(e.by_depth, rows, strict=True)
    )
    wide = any((prompt.weights > 0).sum(dim=-1).max() > NUM_KEPT for prompt in e.prompts if prompt.weights is not None)
    kept = f" Of a single token the {NUM_KEPT} largest weights of a layer are shown." if wide else ""
    return (
        '<p class="note">Mean weights: one row for each layer, one column for each expert, the most used first. A '
        f"hatched cell: the expert cannot be chosen there.{kept}</p>"
        '<div class="controls" id="map-controls" hidden><label>module <select id="kind"></select></label>'
        '<button type="button" id="all-tokens">all tokens that count</button></div>'
        f'<p id="map-of" aria-live="polite"><b>All tokens that count.</b> Darkest: {peak:.2f}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Layers and experts"><table class="heat" id="heat">'
        f'<thead><tr><th scope="col">layer</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(value: float | None, peak: float) -> str:
    if value is None:
        return '<td class="none"></td>'
    return f'<td style="--w:{value / peak:.3f}" title="{value:.3f}"></td>'
