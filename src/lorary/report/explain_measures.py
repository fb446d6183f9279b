"""The tables of an explanation as HTML: experts, what answers owe to them, entropies, agreement of two routers."""

from collections.abc import Sequence

from lorary.evaluate.explanation import Compared, Explanation, Group
from lorary.report.explain_map import colour_of
from lorary.report.explain_strip import named, signed_nats
from lorary.report.markup import MISSING, counted, enumerated, hundredths, text

# Rows of the table of experts; a library may hold hundreds.
NUM_EXPERTS = 40


def experts_section(e: Explanation) -> str:
    """How each expert fares.

    Args:
        e: of a router that decides.
    """
    order = e.ranked()
    rows = "".join(_expert_row(e, i, rank) for rank, i in enumerate(order[:NUM_EXPERTS]))
    rest = [i for i in order[NUM_EXPERTS:] if e.uses[i].verdict != "dead"]
    dead = [e.experts[i] for i in order if e.uses[i].verdict == "dead"]
    more = f'<p class="note">{counted(len(rest), "more expert")} of less use: see --json.</p>' if rest else ""
    never = f'<div class="guard"><p><b>Never chosen:</b> {enumerated([text(n) for n in dead])}.</p></div>'
    heads = _heads(("layers", "chosen", "strongest"))
    return (
        '<p class="note">In the layers where an expert may be chosen: its mean weight, with a mark at an equal share; '
        "how often it has any weight; how often it is the strongest.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Experts"><table class="measures"><thead><tr>'
        f'<th scope="col">expert</th><th scope="col">usage</th>{heads}<th scope="col">remark</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{more}{never if dead else ''}"
    )


def _expert_row(e: Explanation, i: int, rank: int) -> str:
    use, most = e.uses[i], max(max(one.usage, one.equal) for one in e.uses) or 1.0
    bar = f'<i style="--w:{use.usage / most:.3f};--m:{use.equal / most:.3f};--c:{colour_of(rank)}"></i>'
    numbers = _numbers((str(use.layers), _percent(use.chosen), _percent(use.leads)))
    return (
        f'<tr><th scope="row">{text(e.experts[i])}</th><td class="bar marked">{bar}<b>{_percent(use.usage)}</b></td>'
        f"{numbers}<td>{use.verdict}</td></tr>"
    )


def worth_section(e: Explanation) -> str:
    """The likelihood of the answers without each expert, and without any.

    Args:
        e: what was seen.
    """
    base = e.against_base
    lead = (
        f"<p>Without any expert, under the base alone, the log-likelihood changes by "
        f"<strong>{signed_nats(base.change, plus=True)}</strong> nats, {signed_nats(base.per_token, plus=True)} per "
        f"token of the {counted(e.num_answer, 'token')}.</p>"
    )
    if not e.without:
        return lead
    reach = max(abs(one.change) for one in e.without_each) or 1.0
    body = "".join(_worth_row(one, reach) for one in e.without_each)
    return (
        f'{lead}<p class="note">The change when one expert is taken out and the router chooses among the others. '
        '<span class="key up">To the left</span>: the answers are less likely without it, so it helps. '
        '<span class="key down">To the right</span>: they are likelier without it. An expert that others stand in for '
        "changes little, however much it is used.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Counterfactuals"><table class="measures"><thead>'
        f'<tr><th scope="col">without</th><th scope="col" class="wide">change</th>{_heads(("nats", "per token"))}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _worth_row(one: Compared, reach: float) -> str:
    side = "left" if one.change < 0 else "right"
    bar = f'<i class="{side}" style="--w:{abs(one.change) / reach:.3f}"></i>'
    return (
        f'<tr><th scope="row">{text(one.name)}</th><td class="diverging">{bar}</td>'
        f"{_numbers([signed_nats(one.change, plus=True), signed_nats(one.per_token, plus=True)])}</tr>"
    )


def entropy_section(e: Explanation) -> str:
    """Entropies of all layers, by module and by depth.

    Args:
        e: of a router that decides.
    """
    top = max(group.measures.balance for group in (e.overall, *e.by_depth, *e.by_module)) or 1.0
    tables = [
        _entropy_table(e, title, groups, top)
        for title, groups in (("module", e.by_module), ("layer", e.by_depth))
        if len(groups) > 1
    ]
    whole = _entropy_table(e, "", [e.overall], top)
    return (
        '<p class="note">In nats. The dark part is the <b>entropy</b> of single choices: 0 where one expert takes a '
        "token, 0.69 where two share it alike, 1.39 where four do. The whole bar is the <b>balance</b>, the entropy of "
        "the mean weights. What is between them is the <b>information</b>: how far the choice depends on the token."
        f"</p>{whole}{''.join(tables)}"
    )


def _entropy_table(e: Explanation, title: str, groups: Sequence[Group], top: float) -> str:
    heads = _heads(("entropy", "balance", "information"))
    rows = "".join(_entropy_row(e, group, top) for group in groups)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Entropy by {title or "all"}">'
        f'<table class="measures entropies"><thead><tr><th scope="col">{title}</th><th scope="col" class="wide"></th>'
        f'{heads}<th scope="col">most used</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _entropy_row(e: Explanation, group: Group, top: float) -> str:
    m = group.measures
    bar = f'<i style="--w:{m.balance / top:.3f};--part:{m.entropy / m.balance if m.balance > 0 else 0:.3f}"></i>'
    numbers = _numbers([f"{value:.2f}" for value in (m.entropy, m.balance, m.information)])
    used = text(named(e.experts, m.usage.tolist()))
    return f'<tr><th scope="row">{text(group.name)}</th><td class="split">{bar}</td>{numbers}<td>{used}</td></tr>'


def agreement_section(e: Explanation) -> str:
    """The other router: what it makes of the answers, and how far it chooses alike.

    Args:
        e: with another router.
    """
    assert e.against is not None
    other = e.against_other
    assert other is not None
    name = text(e.against[0])
    how = "likelier" if other.change > 0 else "less likely"
    lead = (
        f"<p>Under {name} the answers are {how}: {signed_nats(other.change, plus=True)} nats, "
        f"{signed_nats(other.per_token, plus=True)} per token.</p>"
    )
    if not e.compares:
        return f"{lead}<p>One of the two decides nothing, so there are no choices to compare.</p>"
    rows = "".join(_agreement_row(group) for group in (e.overall, *e.by_module, *e.by_depth))
    heads = _heads(("same strongest", "overlap", "divergence, bits"))
    return (
        f'{lead}<div class="scroll tall" tabindex="0" role="region" aria-label="Agreement"><table class="measures">'
        f'<thead><tr><th scope="col">layers</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _agreement_row(group: Group) -> str:
    a = group.agreement
    shown = (MISSING,) * 3 if a is None else (_percent(a.top1), _percent(a.overlap), f"{a.divergence:.3f}")
    return f'<tr><th scope="row">{text(group.name)}</th>{_numbers(shown)}</tr>'


def _percent(share: float) -> str:
    return f"{hundredths(share)} %"


def _heads(names: Sequence[str]) -> str:
    return "".join(f'<th scope="col" class="number">{name}</th>' for name in names)


def _numbers(shown: Sequence[str]) -> str:
    return "".join(f'<td class="number">{one}</td>' for one in shown)
