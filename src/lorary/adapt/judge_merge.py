"""What a merged adapter does on tasks, beside the base, the uniform mean of the library, and its best experts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorary.adapt.merge_library import MergedAdapter
from lorary.data.schema import Task
from lorary.evaluate.evaluate_library import evaluate_libraries
from lorary.evaluate.evaluation import Evaluation
from lorary.evaluate.seated_base import KnownBase
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.copying import copy_library
from lorary.library.store import Library

MERGED, BESIDE = "merged", ("base", "uniform", "oracle")


@dataclass(frozen=True)
class JudgedMean:
    """The mean of one way over the tasks of a split.

    Args:
        way: `merged`, or a router of the library it was made of.
        split: `held_in` or `held_out`.
        mean: of the primary metric, from 0 to 1, higher is better.
        low: of the 95 % interval over rows.
        high: of the interval.
        tasks: how many.
    """

    way: str
    split: str
    mean: float
    low: float
    high: float
    tasks: int


@dataclass(frozen=True)
class Judgement:
    """A merge on tasks.

    Args:
        rows: test rows of each task, at most.
        means: of the merge and of what stands beside it.
    """

    rows: int
    means: tuple[JudgedMean, ...]

    def to_json(self) -> dict[str, Any]:
        """As provenance and `--json` hold it."""
        return asdict(self) | {"means": [asdict(mean) for mean in self.means]}


def judge_merge(
    base: KnownBase,
    library: Library,
    merged: MergedAdapter,
    tasks: Mapping[str, Task],
    settings: EvaluateSettings,
    *,
    force_base: bool = False,
) -> Judgement:
    """Score a merged adapter on tasks, beside base, uniform and oracle of its library.

    Cells of the library are read from its results where they were scored before; those of the merge are scored anew.

    Args:
        base: the base model.
        library: that the adapter was merged from.
        merged: the adapter.
        tasks: with test rows.
        settings: which rows, and how; routers are those of `BESIDE`.
        force_base: accept unrelated weights of the same shapes.

    Raises:
        LoraryError: if a cell could not be scored.
    """
    with TemporaryDirectory(prefix="lorary-merge-") as folder:
        alone = copy_library(library, Path(folder) / MERGED, (), {})
        # What is held in is so for the whole library.
        known = {task for name in library.names() for task in library.provenance(name)["tasks"]}
        alone.add_adapter(merged.adapter, {**merged.provenance, "tasks": sorted(known)})
        wanted = replace(settings, routers=BESIDE)
        evaluation = evaluate_libraries(base, [library, alone], tasks, wanted, force_base=force_base)
    evaluation.check()
    return Judgement(settings.rows, tuple(_means(evaluation)))


def _means(evaluation: Evaluation) -> list[JudgedMean]:
    first, alone = evaluation.libraries
    ways = {(first, router): router for router in BESIDE} | {(alone, "uniform"): MERGED}
    return [
        JudgedMean(ways[mean.library, mean.router], mean.split, mean.mean, mean.low, mean.high, mean.tasks)
        for mean in evaluation.means
        if (mean.library, mean.router) in ways
    ]
