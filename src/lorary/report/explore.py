"""The page of a library: a map with a card for each adapter, and over a running server a playground."""

from collections.abc import Mapping
from typing import Any

from lorary.library.store import Library
from lorary.report.cluster_plots import cluster_colour, cluster_title
from lorary.report.explore_contents import Explored, ExploredAdapter, cluster_names, explored
from lorary.report.markup import MISSING
from lorary.report.shell import Section, page_html, part

SCRIPTS = ("core.js", "svg.js", "labels.js", "plane.js", "explore_state.js", "explore_map.js", "explore_card.js",
           "explore_table.js", "start_explore.js")  # fmt: skip
LIVE_SCRIPTS = ("answer_stream.js", "receipt.js", "playground.js", "usage.js")
# Lines of the table of adapters that stand there at first; more would make each search wait for the layout.
NUM_LINES = 30
UNITS = ("B", "KiB", "MiB", "GiB")


def explore_page(library: Library, *, live: bool = False) -> str:
    """The page of a library as one string, which loads nothing.

    Making it takes 12 s for 1,000 adapters if their clusters are stored, so a server keeps it until an adapter changes
    (`Library.stamps`).

    Args:
        library: the library; it may be empty.
        live: whether the page is served beside the API of `lorary serve`, which its playground then asks.

    Raises:
        LibraryError: if the library, an adapter's records, stored clusters or results cannot be read.
        AdapterError: if an adapter is damaged.
    """
    return render_explored(explored(library), live=live)


def render_explored(page: Explored, *, live: bool = False) -> str:
    """The page of what was gathered, as `explore_page` gives it."""
    facts = {"base model": page.base, "default router": page.router}
    return page_html(
        page.name,
        facts,
        _sections(page, live=live),
        _data(page),
        scripts=(*SCRIPTS, *(LIVE_SCRIPTS if live else ()), "listen.js"),
        styles=("style.css", "clusters.css", "explore.css", *(("playground.css",) if live else ())),
        may_ask=live,
    )


def _sections(page: Explored, *, live: bool) -> list[Section]:
    sections: list[Section] = []

    def add(template: str, key: str, title: str, *values: Any) -> None:
        sections.append((key, title, part(template, key, *values)))

    if live:
        add("playground.html", "playground", "Playground")
    add("explore.html", "map", "Map", page)
    add("explore.html", "adapters", "Adapters", _rows(page), NUM_LINES)
    if page.cohesion:
        add("explore.html", "clusters", "Clusters", _clusters(page), page.cluster_note)
    if live:
        add("playground.html", "usage", "Usage")
        add("playground.html", "decisions", "Last decisions")
    add("explore.html", "reading", "How to read this page", page.points is not None)
    return sections


def size_words(num_bytes: int) -> str:
    """A size in binary units.

    >>> size_words(940), size_words(932_512)
    ('940 B', '910.7 KiB')
    """
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}" if unit else f"{num_bytes} B"


def _badge(label: int) -> dict[str, Any]:
    return {"title": cluster_title(label), "colour": cluster_colour(label)} if label >= 0 else {}


def _rows(page: Explored) -> list[dict[str, Any]]:
    """The table of adapters."""
    labels = page.labels or [-1] * len(page.adapters)
    return [
        {
            "adapter": adapter,
            "cluster": _badge(label),
            "label": label,
            "nearest": next(iter(page.nearest.get(adapter.name, ())), None),
            "size": size_words(adapter.num_bytes),
        }
        for adapter, label in zip(page.adapters, labels, strict=True)
    ]


def _clusters(page: Explored) -> list[dict[str, Any]]:
    """The table of clusters."""
    return [
        {
            "label": label,
            "cluster": _badge(label),
            "name": name,
            "cohesion": page.cohesion[label],
            "members": [a.name for a, other in zip(page.adapters, page.labels, strict=True) if other == label],
        }
        for label, name in enumerate(cluster_names(page))
    ]


def _data(page: Explored) -> dict[str, Any]:
    """What the scripts draw. Texts that many adapters share stand once, in `texts`."""
    texts: dict[str, int] = {}

    def place(text: str) -> int:
        return texts.setdefault(text, len(texts))

    numbers = {adapter.name: number for number, adapter in enumerate(page.adapters)}
    adapters = [_card(page, adapter, numbers, place) for adapter in page.adapters]
    clusters = range(len(page.cohesion))
    families = sorted({family for adapter in page.adapters for family in adapter.families})
    return {
        "adapters": adapters,
        "texts": list(texts),
        "labels": list(page.labels) or [-1] * len(adapters),
        "points": None if page.points is None else page.points.tolist(),
        "clusters": cluster_names(page),
        "colours": {cluster_title(cluster): cluster_colour(cluster) for cluster in clusters},
        "families": {a.name: a.families[0] for a in page.adapters if len(a.families) == 1},
        "family_names": families,
        "num_lines": NUM_LINES,
    }


def _card(page: Explored, adapter: ExploredAdapter, numbers: Mapping[str, int], place: Any) -> dict[str, Any]:
    alpha = MISSING if adapter.alpha is None else f"{adapter.alpha:g}"
    note = f" ({adapter.alpha_note})" if adapter.alpha_note else ""
    return {
        "name": adapter.name,
        "tasks": list(adapter.tasks),
        "families": list(adapter.families),
        "nearest": [[numbers[name], round(cosine, 3)] for name, cosine in page.nearest.get(adapter.name, ())],
        "facts": [
            ["rank", str(adapter.rank)],
            ["alpha", f"{alpha}{note}"],
            ["layers", MISSING if adapter.targets is None else place(adapter.targets)],
            ["parameters", f"{adapter.num_parameters:,}"],
            ["size", size_words(adapter.num_bytes)],
            ["added", adapter.changed.strftime("%Y-%m-%d %H:%M UTC")],
        ],
        "hash": adapter.content_hash,
        "losses": [round(loss, 3) for loss in adapter.losses] if adapter.losses else None,
        "scores": [
            [
                score.task,
                score.metric,
                round(score.value, 4),
                None if score.base is None else round(score.base, 4),
                score.n,
            ]
            for score in adapter.scores
        ],
        "provenance": [[label, place(text)] for label, text in adapter.provenance],
    }
