"""What the page of a library shows: its adapters, clusters and map, gathered from the folder."""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorary.cluster.mbc import NEAREST
from lorary.data.schema import NO_FAMILY
from lorary.errors import LibraryError, UsageError
from lorary.evaluate.recorded_cells import RecordedScore, recorded_scores
from lorary.formats.peft_config import MOST
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.clusters import MOST_MAPPED, ClusterResult, cluster_library, stored_clusters
from lorary.library.files import read_json
from lorary.library.listing import listed, provenance_in, targets_in, targets_in_short
from lorary.library.readers import read_all
from lorary.library.store import Library
from lorary.library.verify import check_files
from lorary.report.explore_map import library_map
from lorary.report.markup import cosine as cosine_words

# Up to this many adapters the number of clusters is chosen; trying numbers for 1,000 would take minutes.
MOST_CHOSEN = 100
MOST_CLUSTERS = 24
# Characters of one line of provenance, and lines: it may be anybody's.
MOST_TEXT = 300
MOST_LINES = 40
# What a card says elsewhere, or nobody reads.
SHOWN_ELSEWHERE = {"content_hash", "families", "files", "num_parameters", "rank", "tasks"}


@dataclass(frozen=True)
class ExploredAdapter:
    """One adapter as its card shows it.

    Args:
        name: in the library.
        rank: the largest of its layers.
        alpha: LoRA's alpha as its configuration gives it; None where it gives none.
        alpha_note: what changes alpha or the scaling in some layers; empty where nothing does.
        targets: the layers that it adapts, in short; None where its configuration does not list them.
        tasks: what it was trained on, as far as that was recorded.
        families: of these tasks.
        num_parameters: numbers in its factors.
        num_bytes: of its file of weights.
        content_hash: of what it computes.
        changed: time at which its folder was last changed, in UTC.
        losses: mean validation loss of the base and of the adapter, in nats per token; None where not recorded.
        scores: of the adapter alone, out of the library's results.
        provenance: what else was recorded, as label and text.
    """

    name: str
    rank: int
    alpha: float | None
    alpha_note: str
    targets: str | None
    tasks: Sequence[str]
    families: Sequence[str]
    num_parameters: int
    num_bytes: int
    content_hash: str
    changed: datetime
    losses: tuple[float, float] | None = None
    scores: Sequence[RecordedScore] = ()
    provenance: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Explored:
    """One page.

    Args:
        name: of the library.
        base: name of its base model.
        router: the default router, in words.
        adapters: in canonical order.
        labels: cluster of each, -1 for one that computes nothing; empty where there are no clusters.
        cohesion: of each cluster, by its number: mean cosine of two distinct members, None where there is only one.
        cluster_note: how the clusters came about, or why there are none.
        nearest: of each adapter by name the most similar others with the cosine, best first.
        points: (adapters, 2), where each stands on the map; None where there is no map.
    """

    name: str
    base: str
    router: str
    adapters: Sequence[ExploredAdapter]
    labels: Sequence[int] = ()
    cohesion: Sequence[float | None] = ()
    cluster_note: str = ""
    nearest: Mapping[str, Sequence[tuple[str, float]]] = field(default_factory=dict)
    points: NDArray[np.float64] | None = None


def explored(library: Library) -> Explored:
    """Gather what the page of a library shows.

    The clusters that were stored last are taken if they are of these adapters; else they are computed and stored, in
    the number that the library's size suggests.

    Args:
        library: the library; it may be empty.

    Raises:
        LibraryError: if the library, an adapter's records, stored clusters or results cannot be read.
        AdapterError: if an adapter is damaged.
    """
    read = read_all(library.path, _raw_adapter)
    for error in read.values():
        if isinstance(error, Exception):
            raise error
    raws = {name: raw for name, raw in read.items() if isinstance(raw, _Raw)}
    scores = recorded_scores(library, [listed(name, raw.provenance) for name, raw in raws.items()])
    adapters = [_explored_adapter(name, raw, scores.get(name, [])) for name, raw in raws.items()]
    router = library.default_router
    settings = ", ".join(f"{key} {value}" for key, value in router.items() if key != "router" and value is not None)
    contents = Explored(library.name, library.base.name, f"{router['router']} ({settings})", adapters)
    if not 2 <= len(adapters) <= MOST_MAPPED:
        few = "A map needs two adapters." if len(adapters) < 2 else f"A map shows at most {MOST_MAPPED:,} adapters."
        return replace(contents, cluster_note=few)
    try:
        result = _clusters(library, len(adapters))
    except UsageError as error:  # adapters that compute nothing, all of them
        return replace(contents, cluster_note=f"There is no map: {error.rule}.")
    document = result.document
    if list(document["names"]) != [adapter.name for adapter in adapters] or result.cosine is None:
        raise LibraryError(
            f"the adapters of library {library.path} must stay as they are while its page is made",
            found="others than at the start",
            remedy="repeat the command",
        )
    return replace(
        contents,
        labels=document["labels"],
        cohesion=document["cohesion"],
        cluster_note=_cluster_note(document),
        nearest={name: [(other, cosine) for other, cosine in pairs] for name, pairs in document["nearest"].items()},
        points=library_map(library.path, result),
    )


def _clusters(library: Library, number: int) -> ClusterResult:
    """Stored clusters or new ones; their number is chosen or that of the size, and one where directions are too few."""
    if (stored := stored_clusters(library)) is not None:
        return stored
    k: int | Literal["auto"] = "auto" if number <= MOST_CHOSEN else num_clusters(number)
    try:
        return cluster_library(library, k=k)
    except UsageError:
        return cluster_library(library, k=1)


def num_clusters(number: int) -> int:
    """How many clusters many adapters are put in.

    >>> num_clusters(200), num_clusters(1000), num_clusters(10_000)
    (10, 22, 24)
    """
    return min(round(math.sqrt(number / 2)), MOST_CLUSTERS)


def _cluster_note(document: Mapping[str, Any]) -> str:
    parts = [
        f"Method {document['method']}",
        *(["number chosen by silhouette and stability"] if document["is_chosen"] else []),
        *([f"mean silhouette {cosine_words(document['silhouette'])}"] if document["silhouette"] is not None else []),
    ]
    return f"{'; '.join(parts)}."


@dataclass(frozen=True)
class _Raw:
    """The records of one adapter, as of one moment."""

    provenance: Mapping[str, Any]
    config: Mapping[str, Any]
    targets: Sequence[str] | None
    num_bytes: int
    changed: float


def _raw_adapter(folder: Path, name: str) -> _Raw:
    provenance = provenance_in(folder, name)
    check_files(folder, name, provenance)  # clusters that are stored were made of them, and nothing else reads them
    return _Raw(
        provenance,
        read_json(folder / CONFIG_FILE),
        targets_in(folder),
        os.stat(folder / WEIGHTS_FILE, follow_symlinks=False).st_size,
        os.stat(folder, follow_symlinks=False).st_mtime,
    )


def _explored_adapter(name: str, raw: _Raw, scores: Sequence[RecordedScore]) -> ExploredAdapter:
    provenance, alpha = raw.provenance, raw.config.get("lora_alpha")
    notes = [
        *(["other alphas in some layers"] if raw.config.get("alpha_pattern") else []),
        *(["scaling alpha / √rank"] if raw.config.get("use_rslora") else []),
    ]
    return ExploredAdapter(
        name=name,
        rank=provenance["rank"],
        alpha=_number(alpha),
        alpha_note=", ".join(notes),
        targets=None if raw.targets is None else targets_in_short(raw.targets),
        tasks=provenance["tasks"],
        families=_families(provenance),
        num_parameters=provenance["num_parameters"],
        num_bytes=raw.num_bytes,
        content_hash=provenance["content_hash"],
        changed=datetime.fromtimestamp(raw.changed, UTC),
        losses=_losses(provenance.get("metrics")),
        scores=scores,
        provenance=_lines(provenance),
    )


def _families(provenance: Mapping[str, Any]) -> list[str]:
    families = provenance.get("families")  # of an imported adapter: anybody's
    values = {str(family) for family in families.values()} if isinstance(families, dict) else set()
    return sorted(values - {NO_FAMILY})


def _losses(metrics: object) -> tuple[float, float] | None:
    known = metrics if isinstance(metrics, Mapping) else {}
    base, own = (_number(known.get(key)) for key in ("val_loss_base", "val_loss"))
    return None if base is None or own is None else (base, own)


def _number(value: object) -> float | None:
    """A number of anybody's; None for anything else."""
    # An integer of hundreds of digits is compared exactly, where it would overflow as a float.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST
    return float(value) if is_number else None  # type: ignore[arg-type]


def _lines(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rest of a provenance as label and text, one for each key, cut where they are long."""
    rest = {key: value for key, value in provenance.items() if key not in SHOWN_ELSEWHERE}
    rest["base"] = provenance["base"].get("name", "")
    lines = [(key.replace("_", " "), text) for key, value in sorted(rest.items()) if (text := _in_words(value))]
    return [(_cut(label, 60), _cut(text, MOST_TEXT)) for label, text in lines[:MOST_LINES]]


def _in_words(value: object, depth: int = 0) -> str:
    """A value of JSON in words; empty for what says nothing."""
    if value is None or value in ("", [], {}):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        pairs = [(key, _in_words(entry, depth + 1)) for key, entry in value.items()] if depth < 2 else []
        return ", ".join(f"{str(key).replace('_', ' ')} {text}" for key, text in pairs if text)
    if isinstance(value, list):
        is_short = len(value) <= 8 and not any(isinstance(entry, (list, dict)) for entry in value)
        return ", ".join(map(_in_words, value)) if is_short else f"{len(value)} values"
    return str(value)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def cluster_names(page: Explored) -> list[str]:
    """What each cluster is about: the family that at least half of its members have, else its most central member.

    Args:
        page: with clusters.

    Returns:
        One name for each cluster, by its number.
    """
    families = {adapter.name: adapter.families for adapter in page.adapters}
    names = []
    for cluster in range(len(page.cohesion)):
        members = [a.name for a, label in zip(page.adapters, page.labels, strict=True) if label == cluster]
        counts = Counter(family for name in members for family in families[name])
        family, count = min(counts.items(), key=lambda item: (-item[1], item[0]), default=("", 0))
        names.append(family if 2 * count >= len(members) and len(members) > 1 else _central(page, members))
    return names


def _central(page: Explored, members: Sequence[str]) -> str:
    """The member that is nearest to the others, as far as these count it among their nearest."""
    inside = set(members)
    sums = dict.fromkeys(members, 0.0)
    for name in members:
        for other, cosine in page.nearest.get(name, ())[:NEAREST]:
            if other in inside:
                sums[other] += cosine
    return f"around {min(members, key=lambda name: (-sums[name], name))}"
