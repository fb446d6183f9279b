"""The numbers behind the plots, as small JSON documents that the page's script draws."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lorary.report.contents import Similarity
from lorary.report.markup import hundredths
from lorary.report.table_model import BASE, SPLITS, ScoreTable, TableMean, is_told

OTHER = "other"
UNIFORM = "uniform"
# A cosine is stored as a whole number of these parts.
COSINE_PARTS = 10_000
NUM_PAIRS = 10
# So many routers are drawn in the first picture, whatever they are.
MOST_DRAWN = 6


def packed(values: NDArray[Any], kind: str) -> str:
    """Numbers as base64 of little-endian integers, a third of the size of JSON.

    Args:
        values: whole numbers of any shape, flattened row by row.
        kind: numpy's name of the integers: `<u1`, `<u2` or `<i2`.
    """
    return b64encode(values.astype(kind).tobytes()).decode("ascii")


def means_plot(table: ScoreTable) -> dict[str, Any]:
    """Means of all routers, split by split.

    Of many, only the base, the averages of all experts, each split's best router and the oracles.
    """
    shown = {BASE, *(table.best(split) for split in table.splits)}
    shown |= {router for router in table.routers if is_told(router) or table.origin[router][1] == UNIFORM}
    is_few = len(table.routers) <= MOST_DRAWN
    routers = [router for router in table.routers if is_few or router in shown]
    splits = []
    for split in table.splits:
        means = [table.mean(router, split) for router in routers]
        # As the sentences above the picture have them: rounded once.
        points = [mean and [*(float(hundredths(x)) for x in mean[:3]), mean.tasks] for mean in means]
        splits.append({"name": SPLITS[split], "points": points})
    return {"routers": routers, "base": BASE, "main": table.main, "splits": splits}


def score_plot(table: ScoreTable) -> dict[str, Any]:
    """Mean of each router on each family and on all tasks, split by split."""
    splits = []
    for split in table.splits:
        families = list(dict.fromkeys(line.family for line in table.lines(split)))
        groups = [_group(table, split, family) for family in [None, *families]]
        splits.append({"name": SPLITS[split], "groups": groups})
    return {"routers": table.routers, "base": BASE, "main": table.main, "splits": splits}


def _group(table: ScoreTable, split: str, family: str | None) -> dict[str, Any]:
    points = [table.mean(router, split, family) for router in table.routers]
    return {"family": family, "points": [_point(mean) for mean in points]}


def _point(mean: TableMean | None) -> list[float] | None:
    return None if mean is None else [*(round(100 * x, 2) for x in mean[:3]), float(mean.tasks)]


def family_order(similarity: Similarity) -> list[int]:
    """Positions of the experts by family, then by name, so that families are blocks."""
    names = similarity.names
    return sorted(range(len(names)), key=lambda i: (similarity.family.get(names[i], OTHER), names[i]))


def similarity_plot(similarity: Similarity) -> dict[str, Any]:
    """The matrix with the experts by family, packed, and where each family's block lies."""
    order = family_order(similarity)
    names = [similarity.names[i] for i in order]
    families = [similarity.family.get(name, OTHER) for name in names]
    return cosine_plot(similarity.cosine.double().cpu().numpy()[order][:, order], names, families, families)


def cosine_plot(
    cosine: NDArray[Any], names: Sequence[str], families: Sequence[str], groups: Sequence[str]
) -> dict[str, Any]:
    """A matrix of cosines, packed, and where the block of each group lies.

    Args:
        cosine: symmetric, in the order of the names.
        names: of the experts.
        families: of each expert.
        groups: of each expert; those of one group stand side by side.
    """
    starts = [i for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group]
    ends = [*starts[1:], len(names)]
    return {
        "names": list(names),
        "families": list(families),
        "blocks": [{"family": groups[a], "start": a, "end": b} for a, b in zip(starts, ends, strict=True)],
        "parts": COSINE_PARTS,
        "cosine": packed((cosine.clip(-1, 1) * COSINE_PARTS).round(), "<i2"),
    }


def within_and_between(similarity: Similarity) -> tuple[float | None, float | None]:
    """Mean cosine of two experts of one family, and of two families; None where there is no such pair."""
    is_same_family = _same_family(similarity)
    pairs = torch.ones_like(is_same_family).triu(diagonal=1)
    inside, across = similarity.cosine[pairs & is_same_family], similarity.cosine[pairs & ~is_same_family]
    return tuple(float(x.double().mean()) if x.numel() else None for x in (inside, across))  # type: ignore[return-value]


def closest_pairs(similarity: Similarity) -> list[tuple[str, str, float]]:
    """The most similar pairs of experts, the closest first: where duplicates show."""
    count = len(similarity.names)
    first, second = torch.triu_indices(count, count, offset=1)
    values, positions = similarity.cosine[first, second].topk(min(NUM_PAIRS, len(first)))
    pairs = zip(first[positions].tolist(), second[positions].tolist(), values.tolist(), strict=True)
    return [(similarity.names[a], similarity.names[b], value) for a, b, value in pairs]


def _same_family(similarity: Similarity) -> Tensor:
    families = [similarity.family.get(name, OTHER) for name in similarity.names]
    codes = torch.tensor([sorted(set(families)).index(family) for family in families])
    return codes[:, None] == codes


def loss_plot(losses: Mapping[str, tuple[float, float]], families: Mapping[str, str]) -> list[dict[str, Any]]:
    """Validation losses by family and expert."""
    order = sorted(losses, key=lambda name: (families.get(name, OTHER), name))
    rounded = {name: [round(loss, 4) for loss in losses[name]] for name in order}
    return [
        {"name": name, "family": families.get(name, OTHER), "base": base, "expert": expert}
        for name, (base, expert) in rounded.items()
    ]


def family_colours(families: Sequence[str], num_hues: int) -> dict[str, int]:
    """A colour number for each family, in the order of their names; they repeat where there are more families."""
    return {family: i % num_hues for i, family in enumerate(sorted(set(families)))}
