"""The page of an explanation: a strip of tokens, a map of layers and experts, and tables."""

from pathlib import Path
from typing import Any

from lorary.evaluate.explanation import Explanation, LayerGroup, SeenPrompt
from lorary.lora.targets import place_of
from lorary.report.explain_map import NUM_KEPT, column_names, map_data, selectable, usage_map
from lorary.report.markup import counted
from lorary.report.shell import Section, page_html, part, write_page
from lorary.report.tokens import NUM_COLOURS, colour_of, named_weights, visible
from lorary.report.traces import ALL

SCRIPTS = ("core.js", "explain.js")
# Rows of the table of experts; a library may hold hundreds.
NUM_EXPERTS = 40


def write_explanation(path: Path, explanation: Explanation) -> None:
    """Write the page, as `write_page` does."""
    write_page(path, render_explanation(explanation))


def render_explanation(explanation: Explanation) -> str:
    """The page as one string: tables that need no script, and a script that lets a reader choose a token."""
    facts = {
        "base model": explanation.base_model,
        "library": f"{explanation.library}, {len(explanation.experts)} experts",
        "router": _router(explanation),
        "prompt template": explanation.template,
    }
    if explanation.decides:
        facts["tokens"] = f"{explanation.shares.shape[1]} that count, in {len(explanation.layers)} layers"
    return page_html(
        f"{explanation.library}: where {explanation.router} sends {counted(len(explanation.prompts), 'prompt')}",
        facts,
        _sections(explanation),
        map_data(explanation) if explanation.decides else {},
        scripts=SCRIPTS if explanation.decides else (),
        styles=("style.css", "explain.css"),
        plots=False,
    )


def _router(explanation: Explanation) -> str:
    if not explanation.decides:
        return explanation.router
    shown = [f"{key} {value}" for key, value in explanation.settings.items() if key not in ("router", "experts")]
    return f"{explanation.router}, {', '.join(shown)}"


def _sections(e: Explanation) -> list[Section]:
    """The sections that there is something for, in the order in which they are read."""
    sections: list[Section] = []

    def add(key: str, title: str, *values: Any, macro: str | None = None) -> None:
        sections.append((key, title, part("explanation.html", macro or key, *values)))

    if e.decides:
        add("tokens", "Where the tokens went", *_tokens(e))
        add("map", "Layers and experts", *_map(e))
        add("experts", "Experts", *_experts(e))
    else:
        fixed = {name: f"{weight:.3g}" for name, weight in (e.fixed or {}).items()}
        prompts = [{"text": prompt.prompt, "answer": _answer(e, i)} for i, prompt in enumerate(e.prompts)]
        add("tokens", "Where the tokens went", e.router, fixed, prompts, macro="undecided")
    add("worth", "What the answers owe to each expert", e, max((abs(w.change) for w in e.without_each), default=0) or 1)
    if e.decides:
        add("entropy", "How widely tokens are shared", *_entropies(e))
    if e.against:
        groups = (e.overall, *e.by_module, *e.by_depth) if e.compares else ()
        add("agreement", f"Beside {e.against[0]}", e.against[0], e.against_other, groups)
    add("reading", "How to read this page")
    return sections


def _tokens(e: Explanation) -> tuple[list[tuple[str, str]], list[dict[str, Any]], int]:
    """The legend, a strip of tokens for each prompt, and the number of prompts without a map."""
    names = [e.experts[i] for i in e.ranked() if e.uses[i].usage > 0]
    legend = [(name, colour_of(rank)) for rank, name in enumerate(names[:NUM_COLOURS])]
    if len(names) > NUM_COLOURS:
        legend.append((counted(len(names) - NUM_COLOURS, "other"), colour_of(NUM_COLOURS)))
    ranks = {expert: rank for rank, expert in enumerate(e.ranked())}
    num_mapped = len(selectable(e))
    strips = [
        {
            "number": i if i < num_mapped else None,
            "tokens": _strip(e, prompt, ranks),
            "answer": _answer(e, i),
        }
        for i, prompt in enumerate(e.prompts)
    ]
    return legend, strips, len(e.prompts) - num_mapped


def _strip(e: Explanation, prompt: SeenPrompt, ranks: dict[int, int]) -> list[dict[str, Any]]:
    """Each token with the colour and the mean weight over layers of its strongest expert."""
    assert prompt.weights is not None
    means: list[list[float]] = prompt.weights.mean(dim=0).tolist()
    peak = max((max(weights) for weights in means), default=0.0) or 1.0
    strip: list[dict[str, Any]] = []
    for number, (token, weights) in enumerate(zip(prompt.tokens, means, strict=True)):
        best = max(range(len(weights)), key=lambda expert: weights[expert])
        reason = f"; left out: {token.left_out}" if token.left_out else ""
        strip.append(
            {
                "starts_answer": token.part == "answer" and prompt.tokens[number - 1].part == "prompt",
                "left_out": token.left_out,
                "colour": colour_of(ranks[best]) if weights[best] > 0 else "",
                "weight": f"{weights[best] / peak:.2f}" if weights[best] > 0 else "0",
                "title": f"token {number + 1}: {named_weights(e.experts, weights)}{reason}",
                "text": visible(token.text),
            }
        )
    return strip


def _answer(e: Explanation, i: int) -> dict[str, Any]:
    prompt = e.prompts[i]
    origin = "given" if prompt.is_given else "made by the router" if prompt.is_finished else "made by the router, cut"
    likelihood = e.log_likelihood[i]
    return {"text": prompt.answer, "origin": origin, "log_likelihood": likelihood, "num_tokens": prompt.num_answer}


def _map(e: Explanation) -> tuple[list[tuple[str, str]], list[tuple[str, list[float | None]]], float, int]:
    """Columns with their colours, rows of mean weights, the largest of these, and how many weights a token keeps."""
    kinds = {place_of(path)[0] for path in e.layers}
    rows = usage_map(e, ALL if len(kinds) > 1 else next(iter(kinds)))
    peak = max((value for row in rows for value in row if value), default=0.0) or 1.0
    heads = [(name, colour_of(rank)) for rank, name in enumerate(column_names(e))]
    widest = max(int((prompt.weights > 0).sum(dim=-1).max()) for prompt in e.prompts if prompt.weights is not None)
    names = [group.name for group in e.by_depth]
    return heads, list(zip(names, rows, strict=True)), peak, NUM_KEPT if widest > NUM_KEPT else 0


def _experts(e: Explanation) -> tuple[list[dict[str, Any]], float, int, list[str]]:
    """A row for each of the most used, the longest bar, how many more are used, and the names of the dead."""
    order = e.ranked()
    most = max(max(use.usage, use.equal) for use in e.uses) or 1.0
    rows = [
        {"name": e.experts[i], "use": e.uses[i], "colour": colour_of(rank)}
        for rank, i in enumerate(order[:NUM_EXPERTS])
    ]
    num_more = sum(e.uses[i].verdict != "dead" for i in order[NUM_EXPERTS:])
    return rows, most, num_more, [e.experts[i] for i in order if e.uses[i].verdict == "dead"]


def _entropies(e: Explanation) -> tuple[list[tuple[str, list[dict[str, Any]]]], float]:
    """Entropies of all layers, by module and by depth; and the longest bar."""
    tables = [("", [e.overall]), *(t for t in (("module", e.by_module), ("layer", e.by_depth)) if len(t[1]) > 1)]
    top = max(group.measures.balance for group in (e.overall, *e.by_depth, *e.by_module)) or 1.0
    return [(title, [_entropy(e, group) for group in groups]) for title, groups in tables], top


def _entropy(e: Explanation, group: LayerGroup) -> dict[str, Any]:
    m = group.measures
    values = {"entropy": m.entropy, "balance": m.balance, "information": m.information}
    return {"name": group.name, "used": named_weights(e.experts, m.usage.tolist()), **values}
