"""The sections of a map of clusters as HTML: what was found, in words and tables that need no script."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorary.report.asset import asset
from lorary.report.cluster_contents import METHOD_NOTES, ClusterMap
from lorary.report.cluster_plots import NUM_HUES, Matrix, cluster_colour, cluster_title
from lorary.report.markup import MISSING, counted, enumerated, text

# More members of a cluster, or rows of the table of adapters, are folded or scroll.
NUM_PLAIN_MEMBERS = 20
NUM_PLAIN_ROWS = 40
NUM_NEAREST = 3


def sections(found: ClusterMap, plots: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """All sections that there is something for, in the order in which they are read.

    Args:
        found: the contents.
        plots: the documents of the plots; None where there is too little to draw.

    Returns:
        Identifier, title and HTML of each.
    """
    made = [("clusters", "Clusters", _lead(found) + _clusters(found) + _special(found))]
    if len(found.names) > 1:
        made.append(("heat", "Every pair", _plot("similarity", f"{METHOD_NOTES[found.method]} {HEAT_NOTE}")))
    if plots["plane"]:
        made.append(("plane", "In the plane", _plot("plane", _plane_note(found, plots["plane"]["share"]))))
    if plots["tree"]:
        made.append(("tree", "As a tree", _plot("tree", TREE_NOTE)))
    if found.candidates:
        made.append(("choice", "How many clusters", _plot("choice", CHOICE_NOTE)))
    made.append(("adapters", "Every adapter", _adapters(found)))
    return [*made, ("reading", "How to read this page", asset("clusters.html") + _made_with(found))]


HEAT_NOTE = (
    "Frames are clusters; inside them adapters stand in the order of the tree. The diagonal, 1 by definition, is left "
    "blank. The colours reach as far as the values do."
)
TREE_NOTE = (
    "Average linkage, made without the clusters: adapters and groups join at 1 minus their mean cosine. A branch has "
    "the colour of its cluster, grey ones join several. Where a cluster is in pieces, tree and clusters disagree."
)
CHOICE_NOTE = (
    "Silhouette: how much nearer adapters are to their own cluster than to the next one. Stability: how far repeated "
    "clusterings agree. The number that was chosen is marked."
)


def _plot(name: str, note: str) -> str:
    return f'<p class="note">{note}</p><div class="plot" id="plot-{name}" role="img" aria-label="{note}"></div>'


def _plane_note(found: ClusterMap, share: float) -> str:
    shapes = " and the shape its family" if len(set(found.families.values())) > 1 else ""
    return (
        f"The plane that holds most of what tells the adapters apart: {100 * share:.0f} % of the spread, so points "
        "that lie close here may still differ. Lines lead to the middle of a cluster; "
        f"the colour is the cluster{shapes}."
    )


def _lead(found: ClusterMap) -> str:
    kept = found.distinct  # a pair of duplicates says nothing about how alike clusters are
    labels, cosine = np.asarray(found.labels)[kept], found.matrix[np.ix_(kept, kept)]
    same = labels[:, None] == labels
    pairs = np.triu(np.ones_like(same), k=1)
    said = [
        f"<strong>{_signed(cosine[mask].mean())}</strong> {where}"
        for mask, where in ((pairs & same, "inside a cluster"), (pairs & ~same, "across clusters"))
        if mask.any()
    ]
    clusters = counted(len(set(found.labels)), "cluster")
    mean = f" Two of them have a mean cosine of {enumerated(said)}." if said else ""
    score = f" The mean silhouette is {_signed(found.silhouette)}." if found.silhouette is not None else ""
    return f'<p class="lead">{counted(len(found.names), "adapter")} in {clusters}.{mean}{score}</p>'


def _clusters(found: ClusterMap) -> str:
    order = sorted(set(found.labels))
    means = _mean_cosines(found, order)
    rows = "".join(_cluster_row(found, means, order, i) for i in range(len(order)))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Clusters"><table class="clusters"><thead><tr>'
        '<th scope="col">cluster</th><th scope="col" class="number">adapters</th><th scope="col">cohesion</th>'
        '<th scope="col">next cluster</th><th scope="col">members</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _mean_cosines(found: ClusterMap, order: list[int]) -> Matrix:
    """Mean cosine of every two clusters, (clusters, clusters)."""
    member = (np.asarray(found.labels)[:, None] == np.asarray(order)).astype(float)  # (adapters, clusters)
    sizes = member.sum(axis=0)
    means: Matrix = member.T @ found.matrix @ member / (sizes[:, None] * sizes)
    return means


def _cluster_row(found: ClusterMap, means: Matrix, order: list[int], i: int) -> str:
    members = [name for name, label in zip(found.names, found.labels, strict=True) if label == order[i]]
    across = means[i].copy()
    across[i] = -np.inf
    other = int(across.argmax())
    nearest = f"{_badge(order[other])} {_signed(across[other])}" if len(order) > 1 else MISSING
    inside = found.cohesion[order[i]]
    cohesion = MISSING if inside is None else f"{_bar(inside)}<b>{_signed(inside)}</b>"
    return (
        f'<tr><th scope="row">{_badge(order[i])}</th><td class="number" data-label="adapters">{len(members)}</td>'
        f'<td class="cohesion" data-label="cohesion">{cohesion}</td>'
        f'<td class="nearest" data-label="next">{nearest}</td>'
        f'<td class="wide">{_members(found, members)}</td></tr>'
    )


def _members(found: ClusterMap, members: list[str]) -> str:
    def listed(names: list[str]) -> str:
        return "".join(f"<li{_family_title(found, name)}>{text(name)}</li>" for name in names)

    shown, rest = members[:NUM_PLAIN_MEMBERS], members[NUM_PLAIN_MEMBERS:]
    more = f'<details><summary>{len(rest)} more</summary><ul class="members">{listed(rest)}</ul></details>'
    return f'<ul class="members">{listed(shown)}</ul>{more if rest else ""}'


def _family_title(found: ClusterMap, name: str) -> str:
    return f' title="{text(found.families[name])}"' if name in found.families else ""


def _badge(cluster: int) -> str:
    colour = cluster_colour(cluster)
    return f'<span class="badge hue-{colour % NUM_HUES} round-{colour // NUM_HUES % 3}">{cluster_title(cluster)}</span>'


def _bar(value: float) -> str:
    return f'<i style="--w:{min(max(value, 0.0), 1.0):.3f}"></i>'


def _signed(value: float) -> str:
    """A cosine or a silhouette with a true minus.

    >>> _signed(-0.25)
    '−0.25'
    """
    return f"{value:.2f}".replace("-", "−")


def _special(found: ClusterMap) -> str:
    """What needs a decision: adapters that are the same, and adapters that do nothing."""
    groups = "".join(f"<li>{enumerated([text(name) for name in group])}</li>" for group in found.duplicates)
    said = ""
    if groups:
        said += f"<p><b>Duplicates.</b> These compute the same; each group counts once.</p><ul>{groups}</ul>"
    if found.zero:
        names = enumerated([text(name) for name in found.zero])
        said += f"<p><b>Zero adapters.</b> These compute nothing and are in no cluster: {names}.</p>"
    if said:
        return f'<div class="guard">{said}</div>'
    return '<div class="guard clear"><p>No two adapters compute the same, and each computes something.</p></div>'


def _adapters(found: ClusterMap) -> str:
    has_families = bool(found.families)
    order = sorted(range(len(found.names)), key=lambda i: (found.labels[i], found.names[i]))
    rows = "".join(_adapter_row(found, i, has_families) for i in order)
    family = '<th scope="col">family</th>' if has_families else ""
    scroll = "scroll tall" if len(order) > NUM_PLAIN_ROWS else "scroll"
    return (
        '<p class="note">The nearest others by cosine; those of another cluster are in italics.</p>'
        f'<div class="{scroll}" tabindex="0" role="region" aria-label="Every adapter"><table class="clusters"><thead>'
        f'<tr><th scope="col">adapter</th>{family}<th scope="col">cluster</th><th scope="col">nearest</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _adapter_row(found: ClusterMap, i: int, has_families: bool) -> str:
    name = found.names[i]
    others = sorted((j for j in range(len(found.names)) if j != i), key=lambda j: (-found.matrix[i, j], found.names[j]))
    nearest = "".join(_neighbour(found, i, j) for j in others[:NUM_NEAREST])
    family = f"<td>{text(found.families.get(name, MISSING))}</td>" if has_families else ""
    return (
        f'<tr><th scope="row">{text(name)}</th>{family}<td>{_badge(found.labels[i])}</td>'
        f'<td class="wide"><ul class="members">{nearest}</ul></td></tr>'
    )


def _neighbour(found: ClusterMap, i: int, j: int) -> str:
    name = text(found.names[j])
    shown = name if found.labels[i] == found.labels[j] else f"<em>{name}</em>"
    return f"<li>{shown} <small>{_signed(found.matrix[i, j])}</small></li>"


def _made_with(found: ClusterMap) -> str:
    versions = ", ".join(f"{text(package)} {text(version)}" for package, version in found.versions.items())
    return f'<p class="note">Made with {versions}.</p>' if versions else ""
