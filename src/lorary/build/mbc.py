"""`--method mbc`: a short private pass, clusters of its adapters, one expert per cluster. Each stage can be resumed.

private adapters   LIB/.build/private (or the library that --private names)
clusters           LIB/derived/assignment_of_tasks-HASH, keyed by the hashes of these adapters
experts            LIB/adapters/cluster_0, cluster_1, ...: from scratch, on the union of each cluster's tasks
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.build.choose_k import choose_k
from lorary.build.cluster_settings import ClusterSettings
from lorary.build.experts import check_clusters, check_same_build, other_build
from lorary.build.jobs import ExpertSpec, cluster_units, override, private_units
from lorary.build.settings import BuildSettings
from lorary.build.state import sweep
from lorary.build.task_clusters import cluster_tasks
from lorary.build.train_units import BuildContext, train_units
from lorary.cluster.baselines import check_k
from lorary.data.schema import Task
from lorary.errors import LibraryError, UsageError
from lorary.library.configuration import differing_fields, in_words
from lorary.library.layout import BUILD_FOLDER, LIBRARY_FILE
from lorary.library.store import Library

PRIVATE = "private"


def build_mbc(
    context: BuildContext,
    settings: BuildSettings,
    clusters: ClusterSettings,
    overrides: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Train one expert per cluster of tasks.

    Args:
        context: where.
        settings: how to train the experts.
        clusters: how to find the clusters, and how to train the private adapters before.
        overrides: settings of single experts, by name.

    Returns:
        Names of the experts trained by this run, of those that were there, and the table of the choice of k.

    Raises:
        LibraryError: if the library, or that of the private adapters, holds experts of another build.
        UsageError: if there cannot be that many clusters.
    """
    check_numbers(clusters, len(context.tasks))
    before = set(context.library.names())
    private = train_private(context, settings, clusters) if clusters.by == "mbc" else None
    candidates = [cluster_tasks(context, private, clusters, k) for k in numbers_of(clusters)]
    plans = {c.k: override(cluster_units(c.labels, settings, c.parents, c.origin), overrides) for c in candidates}
    table = choose_k(context, plans) if len(plans) > 1 else []
    units = plans[next((row["k"] for row in table if row["chosen"]), candidates[0].k)]
    check_clusters(context.library, units, context.tasks, context.base_dtype)
    train_units(context, units)
    kept = [unit for unit in units if unit.name in before]
    _say_stale_parents(context, kept)
    return [unit.name for unit in units if unit.name not in before], [unit.name for unit in kept], table


def numbers_of(clusters: ClusterSettings) -> tuple[int | None, ...]:
    """The numbers of clusters to try; None where the adapters, or the families, say themselves how many."""
    return (None,) if clusters.by == "family" else clusters.k or (None,)


def check_numbers(clusters: ClusterSettings, num_tasks: int) -> None:
    """Refuse more clusters than tasks before anything is trained.

    Raises:
        UsageError: if there cannot be that many clusters.
    """
    for k in numbers_of(clusters):
        if k is not None:
            check_k(k, num_tasks)


def _say_stale_parents(context: BuildContext, kept: Sequence[ExpertSpec]) -> None:
    """An expert is what its own rows and settings make it; by which adapters these were brought together may change."""
    stale = [u.name for u in kept if tuple(context.library.provenance(u.name).get("parents", ())) != u.parents]
    if stale:
        context.display.say(f"kept, though the private adapters they name as parents have changed: {', '.join(stale)}")


def train_private(context: BuildContext, settings: BuildSettings, clusters: ClusterSettings) -> Library:
    """The library of the private adapters, with one for every task.

    A library that is named is taken as it is: only tasks that it lacks are trained. One that lacks none is only read.

    Raises:
        LibraryError: if it holds adapters of these names that are not of these tasks, or of another build.
    """
    path = private_folder(context.library.path, clusters)
    library = _open_private(path, context)
    units = planned_private(library, context.tasks, settings, clusters, context.base_dtype)
    context.display.say(f"private adapters: {path}")
    if clusters.private is not None and not {unit.name for unit in units} - set(library.names()):
        return library
    with library.build_lock():
        trained, _ = train_units(replace(context, library=library), units)
        if trained and clusters.private is None:
            sweep(path)
    return library


def planned_private(
    library: Library | None,
    tasks: Mapping[str, Task],
    settings: BuildSettings,
    clusters: ClusterSettings,
    base_dtype: str | None,
) -> list[ExpertSpec]:
    """The private adapters that are this build's to train; some of them may be there already.

    Args:
        library: where they lie; None where it is not there yet.
        tasks: all tasks, by name.
        settings: of the experts of the clusters.
        clusters: how the private pass differs.
        base_dtype: as for `check_same_build`.

    Raises:
        LibraryError: if the library holds adapters of these names that are not of these tasks, or of another build.
    """
    units = private_units(tasks, clusters.private_settings(settings))
    names = set() if library is None else set(library.names())
    taken = [unit for unit in units if unit.name in names]
    if library is None or not taken:
        return units
    if clusters.private is None:
        _check_own(library, taken, tasks, base_dtype)
        return units
    _check_taken(library, taken, tasks)
    # Those that an interrupted run of this very build has put there remain its own, and so does their company.
    foreign = {unit.name for unit in taken if other_build(library, unit, tasks, base_dtype)}
    return [unit for unit in units if unit.name not in foreign]


def private_folder(library: Path, clusters: ClusterSettings) -> Path:
    """Where the private adapters of a library's clusters lie.

    Raises:
        UsageError: if that is the library itself.
    """
    path = library / BUILD_FOLDER / PRIVATE if clusters.private is None else Path(clusters.private)
    if path.resolve() == library.resolve():
        raise UsageError("--private must not be the library that is built", found=path, remedy="name another folder")
    return path


def _open_private(path: Path, context: BuildContext) -> Library:
    # A folder without the file is what a build leaves that was killed while it made the library.
    if not (path / LIBRARY_FILE).exists():
        base = context.base.model if context.base is not None else context.base_reference
        return Library.create(path, base, base_name=context.library.base.name)
    library = Library.open(path)
    fingerprint, private_fingerprint = context.library.base.fingerprint, library.base.fingerprint
    differing = differing_fields(fingerprint.configuration, private_fingerprint.configuration)
    if private_fingerprint.digest != fingerprint.digest or differing:
        fields = f", {in_words(differing)}" if differing else ""
        raise LibraryError(
            f"the library of private adapters '{path}' must be over the base of '{context.library.path}'",
            found=f"{library.base.name} instead of {context.library.base.name}{fields}",
            remedy="name another with --private",
        )
    return library


def _check_own(
    library: Library, units: Sequence[ExpertSpec], tasks: Mapping[str, Task], base_dtype: str | None
) -> None:
    try:
        check_same_build(library, units, tasks, base_dtype)
    except LibraryError as error:
        # Nobody but builds of clusters puts anything there.
        remedy = f"delete the folder {library.path}, or name another with --private"
        raise LibraryError(error.rule, found=error.found, remedy=remedy) from error


def _check_taken(library: Library, units: Sequence[ExpertSpec], tasks: Mapping[str, Task]) -> None:
    for name in (unit.name for unit in units):
        provenance, hashes = library.provenance(name), {name: tasks[name].data_hash}
        if provenance["tasks"] not in ([], [name]) or provenance.get("data_hashes", hashes) != hashes:
            raise LibraryError(
                f"adapter '{name}' of library '{library.path}' must be one of task '{name}' as it is now",
                found=f"tasks {provenance['tasks']}, other data"
                if provenance["tasks"] == [name]
                else f"tasks {provenance['tasks']}",
                remedy="name another library with --private",
            )
