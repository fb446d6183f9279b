"""What a build has still to do, found out without doing or writing anything: the stages of a dry run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorary.build.choose_k import known_choice
from lorary.build.cluster_settings import ClusterSettings
from lorary.build.experts import check_clusters, check_same_build
from lorary.build.jobs import ExpertSpec, cluster_units, joint_units, override, private_units
from lorary.build.mbc import check_numbers, numbers_of, planned_private, private_folder
from lorary.build.methods import MethodSettings
from lorary.build.poly import is_finished, poly_unit
from lorary.build.poly_export import check_exports
from lorary.build.settings import BuildSettings, RunSettings
from lorary.build.state import candidate_folder
from lorary.build.task_clusters import known_clusters
from lorary.data.schema import Task
from lorary.library.layout import LIBRARY_FILE
from lorary.library.store import Library
from lorary.model.base import Base

# Clusters where the adapters themselves shall say how many.
ASSUMED_K = 10


@dataclass(frozen=True)
class Stage:
    """Experts that are trained together.

    Args:
        name: in words.
        units: the experts.
        existing: names of those that are there already, trained as this build would train them.
    """

    name: str
    units: Sequence[ExpertSpec]
    existing: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Place:
    """Where a build would happen.

    Args:
        path: folder of the library, there or not.
        tasks: to train on, by name.
        base: the base model.
        run: how to run.
        notes: what had to be assumed.
    """

    path: Path
    tasks: Mapping[str, Task]
    base: Base
    run: RunSettings
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> str:
        """Of the base, as it is recorded."""
        return self.run.precision_of(self.base.model)

    def opened(self, path: Path) -> Library | None:
        """The library in a folder, checked against the base; None where there is none yet."""
        if not (path / LIBRARY_FILE).exists():
            return None
        library = Library.open(path)
        library.check_base(self.base.model)
        return library

    def stage(self, name: str, path: Path, units: Sequence[ExpertSpec]) -> Stage:
        """Units against what a folder holds; an expert of another build is refused as the build itself would."""
        library = self.opened(path)
        names = set() if library is None else set(library.names())
        existing = [unit for unit in units if unit.name in names]
        if library is not None:
            check_same_build(library, existing, self.tasks, self.dtype)
        return Stage(name, units, frozenset(unit.name for unit in existing))


def plan_stages(
    tasks: Mapping[str, Task],
    library_path: str,
    settings: BuildSettings,
    method: MethodSettings,
    base: Base,
    run: RunSettings,
) -> tuple[list[Stage], list[str]]:
    """The stages of a build, as far as they are known.

    Args:
        tasks: to train on, by name.
        library_path: folder of the library, there or not.
        settings: how to train.
        method: how to assign tasks to experts.
        base: the base model.
        run: how to run.

    Returns:
        The stages, and what had to be assumed about them.

    Raises:
        LoraryError: as the build itself would refuse the library, its experts or the settings.
    """
    place = _Place(Path(library_path), tasks, base, run)
    names = sorted(tasks)
    if method.is_poly:
        stages = [_poly_stage(place, names, settings, method)]
    elif method.method == "mbc":
        stages = _mbc_stages(place, settings, method.clusters, method.overrides)
    else:
        make = joint_units if method.method == "joint" else private_units
        stages = [place.stage("experts", place.path, override(make(names, settings), method.overrides))]
    return stages, place.notes


def _poly_stage(place: _Place, names: Sequence[str], settings: BuildSettings, method: MethodSettings) -> Stage:
    library, unit, poly = place.opened(place.path), poly_unit(names, settings, method.poly), method.poly
    is_done = False
    if library is not None:
        is_done = is_finished(library, unit, poly, place.tasks, place.dtype)
        check_exports(library, unit, poly, place.tasks, place.dtype, mu=method.mu, per_task=method.per_task)
    return Stage(method.method, [unit], frozenset([unit.name] if is_done else []))


def _mbc_stages(
    place: _Place, settings: BuildSettings, clusters: ClusterSettings, overrides: Mapping[str, Mapping[str, Any]]
) -> list[Stage]:
    check_numbers(clusters, len(place.tasks))
    library, private, stages = place.opened(place.path), None, []
    if clusters.by == "mbc":
        private = place.opened(private_folder(place.path, clusters))
        units = planned_private(private, place.tasks, settings, clusters, place.dtype)
        existing = frozenset() if private is None else frozenset(private.names())
        stages.append(Stage("private adapters", units, existing))
        if private is not None and not existing >= set(place.tasks):
            private = None
    plans, are_known = _plans(place, settings, clusters, overrides, private)
    if not are_known:
        place.notes.append("clusters are not known yet: equal sizes are assumed, and that all are to be trained")
        return [*stages, *(Stage(f"{k} clusters", units) for k, units in plans.items())]
    if len(plans) == 1:
        ((k, units),) = plans.items()
    elif (table := known_choice(place.path, plans, place.tasks, place.run.precision)) is not None:
        k = next(row["k"] for row in table if row["chosen"])
        units = plans[k]
    else:
        if library is not None:
            check_clusters(library, [], place.tasks, place.dtype)
        return [*stages, *(_candidate(place, k, units) for k, units in plans.items())]
    if library is not None:
        check_clusters(library, units, place.tasks, place.dtype)
    return [*stages, place.stage(f"{k} clusters", place.path, units)]


def _candidate(place: _Place, k: int, units: Sequence[ExpertSpec]) -> Stage:
    folder = candidate_folder(place.path, k, units, place.tasks, place.run.precision)
    return place.stage(f"{k} clusters", folder, units)


def _plans(
    place: _Place,
    settings: BuildSettings,
    clusters: ClusterSettings,
    overrides: Mapping[str, Mapping[str, Any]],
    private: Library | None,
) -> tuple[dict[int, list[ExpertSpec]], bool]:
    """Experts by number of clusters, and whether these are known: recorded, or what a baseline says."""
    plans, are_known = {}, True
    for k in numbers_of(clusters):
        clustering = None
        if private is not None or clusters.by != "mbc":
            clustering = known_clusters(place.path, place.tasks, private, clusters, k)
        if clustering is not None:
            units = cluster_units(clustering.labels, settings, clustering.parents, clustering.origin)
            plans[clustering.k] = override(units, overrides)
            continue
        are_known = False
        number = k or min(ASSUMED_K, len(place.tasks))
        even = cluster_units({name: i % number for i, name in enumerate(sorted(place.tasks))}, settings, {}, {})
        applicable = overrides
        if k is None:
            place.notes.append(f"--k auto is not known before the private adapters are: {number} is assumed")
            applicable = {name: changes for name, changes in overrides.items() if name in {unit.name for unit in even}}
        plans[number] = override(even, applicable)
    return plans, are_known
