"""The prompts of an explanation as HTML: strips of tokens in the colours of their experts, and the answers."""

from collections.abc import Sequence

from lorary.evaluate.explanation import Explanation, SeenPrompt, SeenToken
from lorary.report.explain_map import NUM_COLOURS, colour_of, selectable
from lorary.report.markup import counted, text

NUM_NAMED = 3


def undecided_section(e: Explanation) -> str:
    """A router that looks at nothing: what acts on every token, and the prompts as they are.

    Args:
        e: what was seen.
    """
    weights = "".join(f"<li><span>{text(n)}</span><b>{w:.3g}</b></li>" for n, w in (e.fixed or {}).items())
    acts = "All tokens get the same experts in every layer:" if weights else "No expert acts."
    prompts = "".join(
        f'<div class="tokens">{text(prompt.prompt)}</div>{_answer(e, i)}' for i, prompt in enumerate(e.prompts)
    )
    return (
        f'<div class="guard clear"><p><b>Router {text(e.router)} decides nothing</b>, so there are no choices to show. '
        f'{acts}</p></div><ol class="pairs few">{weights}</ol>{prompts}'
    )


def prompts_section(e: Explanation) -> str:
    """The legend, and a strip of tokens for each prompt.

    Args:
        e: of a router that decides.
    """
    ranks = {expert: rank for rank, expert in enumerate(e.ranked())}
    chosen = len(selectable(e))
    strips = "".join(_strip(e, i, ranks, is_chosen=i < chosen) for i in range(len(e.prompts)))
    note = (
        "Each token in the colour of the expert with the largest mean weight over all layers, fuller where that is "
        "larger. Pale tokens with a dashed line are left out of all statistics: point at them for the reason."
    )
    rest = len(e.prompts) - chosen
    more = f" The tokens of {counted(rest, 'prompt')} have no map: the page would grow too large." if rest else ""
    return f'<p class="note">{note}{more}</p>{_legend(e)}<div class="strips">{strips}</div>'


def _legend(e: Explanation) -> str:
    names = [e.experts[i] for i in e.ranked() if e.uses[i].usage > 0]
    coloured = list(enumerate(names[:NUM_COLOURS]))
    items = "".join(f'<li style="--c:{colour_of(rank)}">{text(name)}</li>' for rank, name in coloured)
    others = (
        f'<li style="--c:{colour_of(NUM_COLOURS)}">{counted(len(names) - NUM_COLOURS, "other")}</li>'
        if len(names) > NUM_COLOURS
        else ""
    )
    return f'<ul class="legend">{items}{others}</ul>'


def _strip(e: Explanation, i: int, ranks: dict[int, int], *, is_chosen: bool) -> str:
    prompt = e.prompts[i]
    means = _means(prompt)
    peak = max((max(own) for own in means), default=0.0) or 1.0
    parts = []
    for number, (token, own) in enumerate(zip(prompt.tokens, means, strict=True)):
        if token.part == "answer" and prompt.tokens[number - 1].part == "prompt":
            parts.append('<small class="turn">answer</small>')
        parts.append(_token(e, number, token, own, ranks, peak))
    data = f' data-prompt="{i}"' if is_chosen else ""
    return f'<div class="tokens strip"{data}>{"".join(parts)}</div>{_answer(e, i)}'


def _means(prompt: SeenPrompt) -> list[list[float]]:
    assert prompt.weights is not None
    means: list[list[float]] = prompt.weights.mean(dim=0).tolist()
    return means


def _token(
    e: Explanation, number: int, token: SeenToken, means: Sequence[float], ranks: dict[int, int], peak: float
) -> str:
    best = max(range(len(means)), key=lambda expert: means[expert])
    style = f"--c:{colour_of(ranks[best])};--w:{means[best] / peak:.2f}" if means[best] > 0 else "--w:0"
    reason = f"; left out: {token.left_out}" if token.left_out else ""
    title = f"token {number + 1}: {named(e.experts, means)}{reason}"
    kind = "token left-out" if token.left_out else "token"
    return f'<span class="{kind}" style="{style}" title="{text(title)}">{text(visible(token.text))}</span>'


def visible(token: str) -> str:
    """A token with its white space seen, and a sign for an empty one."""
    return token.replace("\n", "↵").replace("\t", "⇥") or "∅"


def named(experts: Sequence[str], weights: Sequence[float]) -> str:
    """The experts of the largest weights, with these.

    Args:
        experts: names.
        weights: of each.
    """
    order = sorted((i for i, weight in enumerate(weights) if weight > 0), key=lambda i: -weights[i])[:NUM_NAMED]
    return ", ".join(f"{experts[i]} {weights[i]:.2f}" for i in order) or "no expert"


def _answer(e: Explanation, i: int) -> str:
    prompt = e.prompts[i]
    kind = "given" if prompt.is_given else "made by the router" if prompt.is_finished else "made by the router, cut"
    shown = text(prompt.answer) or "<i>nothing: it ends at once</i>"
    likelihood = f"{signed_nats(e.log_likelihood[i])} nats over {counted(prompt.num_answer, 'token')}"
    return f'<p class="answer"><small>answer, {kind}:</small> {shown} <small>log-likelihood {likelihood}</small></p>'


def signed_nats(value: float, *, plus: bool = False) -> str:
    """A number of nats with a true minus; what rounds to zero has no sign.

    >>> signed_nats(-0.5), signed_nats(-0.0001)
    ('−0.500', '0.000')
    """
    shown = f"{abs(value):.3f}"
    sign = "−" if value < 0 else "+" if plus else ""
    return shown if float(shown) == 0 else f"{sign}{shown}"
