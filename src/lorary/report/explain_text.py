"""An explanation as text in the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorary.display import table_console
from lorary.evaluate.explanation import Explanation, LayerGroup, SeenPrompt
from lorary.report.tables import text_table

# More rows fill screens that nobody reads; --json and --report have them.
NUM_TOKENS = 80
NUM_EXPERTS = 40
COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_yellow")


def print_explanation(explanation: Explanation) -> None:
    """Print what was seen: the answers, where tokens went, experts, modules, layers, and what each expert is worth.

    Args:
        explanation: what was seen.
    """
    console = table_console()
    for i in range(len(explanation.prompts)):
        _print_prompt(console, explanation, i)
    console.print(_answers(explanation))
    if not explanation.decides:
        console.print(Text(nothing_decided(explanation)))
        return
    console.print(_experts(explanation))
    for title, groups in (("modules", explanation.by_module), ("layers", explanation.by_depth)):
        if len(groups) > 1:
            console.print(_groups(explanation, title, groups))
    for line in _lines(explanation):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def nothing_decided(explanation: Explanation) -> str:
    """What is to be said of a router that looks at nothing."""
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in (explanation.fixed or {}).items())
    acts = f"all tokens get the same experts in every layer: {weights}" if weights else "no expert acts"
    return f"router '{explanation.router}' decides nothing, so there are no choices to show: {acts}."


def _print_prompt(console: Console, e: Explanation, i: int) -> None:
    prompt = e.prompts[i]
    origin = "given" if prompt.is_given else "made by the router" if prompt.is_finished else "made, and cut"
    if e.decides:
        console.print(_strip(e, prompt))
        if len(e.prompts) == 1:
            console.print(_tokens(e, prompt))
    else:
        console.print(Text(prompt.prompt.strip()))
    console.print(Text.assemble((f"answer ({origin}): ", "bold"), prompt.answer or "nothing: it ends at once"))


def _strip(e: Explanation, prompt: SeenPrompt) -> Text:
    """The tokens in the colours of their strongest experts, those left out of statistics dim."""
    colours = dict(zip(e.ranked(), COLOURS, strict=False))
    assert prompt.weights is not None
    means = prompt.weights.mean(dim=0)
    strip = Text()
    for token, mean in zip(prompt.tokens, means, strict=True):
        colour = colours.get(int(mean.argmax()), "default") if mean.any() else "default"
        strip.append(token.text, "dim" if token.left_out else colour)
    strip.append("\n")
    for expert, colour in colours.items():
        strip.append(f"■ {e.experts[expert]}  ", colour)
    return strip


def _tokens(e: Explanation, prompt: SeenPrompt) -> Table:
    heads = (">token", "<text", "<strongest experts", "<left out of statistics")
    table = text_table("tokens: mean weight over layers", *heads, caption=_more(len(prompt.tokens) - NUM_TOKENS))
    assert prompt.weights is not None
    means = prompt.weights.mean(dim=0)[:NUM_TOKENS].tolist()
    for number, (token, mean) in enumerate(zip(prompt.tokens, means, strict=False), start=1):
        style = "dim" if token.left_out else None
        shown = Text(repr(token.text)[1:-1])
        table.add_row(str(number), shown, Text(_named(e.experts, mean, 3)), token.left_out, style=style)
    return table


def _more(count: int) -> str | None:
    return f"{count} more: see --json" if count > 0 else None


def _named(experts: Sequence[str], weights: Sequence[float], most: int) -> str:
    order = sorted((i for i, weight in enumerate(weights) if weight > 0), key=lambda i: -weights[i])[:most]
    return ", ".join(f"{experts[i]} {weights[i]:.2f}" for i in order) or "none: the base alone"


def _answers(e: Explanation) -> Table:
    """The answers under other settings."""
    table = text_table("log-likelihood of the answers, in nats", "<setting", ">sum", ">change", ">per token")
    table.add_row(escape(f"router {e.router}"), f"{sum(e.log_likelihood):.3f}", "", "")
    comparisons = [("", e.against_base), ("router ", e.against_other)]
    for kind, comparison in [*comparisons, *(("without ", without) for without in e.without_each)]:
        if comparison is not None:
            numbers = (
                f"{sum(comparison.log_likelihood):.3f}",
                f"{comparison.change:+.3f}",
                f"{comparison.per_token:+.3f}",
            )
            table.add_row(escape(f"{kind}{comparison.name}"), *numbers)
    return table


def _experts(e: Explanation) -> Table:
    heads = ("<expert", ">layers", ">usage", ">equal share", ">chosen", ">strongest", "<remark")
    caption = _more(len(e.experts) - NUM_EXPERTS)
    table = text_table("experts, where each may be chosen", *heads, caption=caption)
    for i in e.ranked()[:NUM_EXPERTS]:
        use = e.uses[i]
        rates = (f"{value:.1%}" for value in (use.usage, use.equal, use.chosen, use.leads))
        table.add_row(escape(e.experts[i]), str(use.layers), *rates, use.verdict)
    return table


def _groups(e: Explanation, title: str, groups: Sequence[LayerGroup]) -> Table:
    compared = (">same strongest", ">overlap", ">divergence") if e.compares else ()
    heads = (f"<{title[:-1]}", ">entropy", ">balance", ">information", "<most used", *compared)
    table = text_table(title, *heads)
    for group in [e.overall, *groups]:
        m = group.measures
        numbers = [f"{value:.3f}" for value in (m.entropy, m.balance, m.information)]
        table.add_row(
            escape(group.name), *numbers, escape(_named(e.experts, m.usage.tolist(), 2)),
            *([] if group.agreement is None else [f"{value:.3f}" for value in group.agreement]),
        )  # fmt: skip
    return table


def _lines(e: Explanation) -> list[str]:
    num_layers, num_tokens = e.shares.shape[:2]
    left_out = sum(len(prompt.tokens) for prompt in e.prompts) - num_tokens
    lines = [f"{num_tokens} tokens in {num_layers} layers count; {left_out} left out as attention sinks"]
    for verdict in ("dead", "hardly used", "dominating", "out of reach"):
        names = [name for name, use in zip(e.experts, e.uses, strict=True) if use.verdict == verdict]
        if names:
            lines.append(f"{verdict}: {', '.join(names)}")
    if e.against and not e.compares:
        lines.append(f"router '{e.against[0]}' decides nothing: only the likelihoods of the answers are compared")
    if e.overall.agreement is not None and e.against:
        a = e.overall.agreement
        lines.append(
            f"agreement with {e.against[0]}: same strongest expert {a.top1:.1%}, overlap {a.overlap:.1%}, "
            f"Jensen-Shannon divergence {a.divergence:.3f} bits"
        )
    return lines
