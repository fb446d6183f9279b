"""`--method mbc`: a short private pass, clusters of its adapters, one expert per cluster. Each stage can be resumed.

private adapters   LIB/.build/private (or the library that --private names)
clusters           LIB/derived/clusters-HASH, keyed by the hashes of these adapters
experts            LIB/adapters/cluster_0, cluster_1, ...: from scratch, on the union of each cluster's tasks
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorary.cluster.baselines import family_labels, random_labels, text_labels
from lorary.cluster.mbc import cluster_adapters
from lorary.data.encoder import embed_tasks
from lorary.errors import LibraryError, UsageError
from lorary.library.derived import derived_folder, load_derived, save_derived
from lorary.library.files import encode_json
from lorary.library.store import Library
from lorary.recipes.build_settings import BuildSettings, ClusterSettings
from lorary.recipes.choose_k import choose_k
from lorary.recipes.jobs import cluster_units, override, private_units
from lorary.recipes.open import BUILD_FOLDER
from lorary.recipes.workshop import Workshop, train_units

KIND, DOCUMENT = "clusters", "clusters.json"
PRIVATE = "private"


@dataclass(frozen=True)
class Clusters:
    """An assignment of tasks to clusters.

    Args:
        k: number of clusters asked for, or found.
        labels: cluster of each task.
        parents: content hash of the adapter that stood for each task; empty where no adapter decided.
        origin: how it came about, for the experts' provenance.
    """

    k: int
    labels: Mapping[str, int]
    parents: Mapping[str, str]
    origin: Mapping[str, Any]


def build_mbc(
    shop: Workshop,
    settings: BuildSettings,
    clusters: ClusterSettings,
    overrides: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Train one expert per cluster of tasks.

    Args:
        shop: where.
        settings: how to train the experts.
        clusters: how to find the clusters, and how to train the private adapters before.
        overrides: settings of single experts, by name.

    Returns:
        Names of the experts trained by this run, of those that were there, and the table of the choice of k.

    Raises:
        LibraryError: if the library, or that of the private adapters, holds experts of another build.
        UsageError: if there cannot be that many clusters.
    """
    check_k(clusters, len(shop.tasks))
    before = set(shop.library.names())
    private = train_private(shop, settings, clusters) if clusters.by == "mbc" else None
    numbers = (None,) if clusters.by == "family" else clusters.k or (None,)  # families say themselves how many
    candidates = [cluster_tasks(shop, private, clusters, k) for k in numbers]
    plans = {c.k: override(cluster_units(c.labels, settings, c.parents, c.origin), overrides) for c in candidates}
    table: list[dict[str, Any]] = []
    if len(plans) > 1:
        table = choose_k(shop, plans)
    chosen = next((row["k"] for row in table if row["chosen"]), candidates[0].k)
    train_units(shop, plans[chosen])
    names = [unit.name for unit in plans[chosen]]
    return [name for name in names if name not in before], [name for name in names if name in before], table


def check_k(clusters: ClusterSettings, num_tasks: int) -> None:
    """Refuse more clusters than tasks before anything is trained.

    Raises:
        UsageError: if there cannot be that many clusters.
    """
    if clusters.by != "family" and max(clusters.k, default=1) > num_tasks:
        raise UsageError(
            f"--k must be at most {num_tasks}, the number of tasks", found=max(clusters.k), remedy="ask for fewer"
        )


def train_private(shop: Workshop, settings: BuildSettings, clusters: ClusterSettings) -> Library:
    """The library of the private adapters, with one for every task.

    A library that is named is taken as it is: only tasks that it lacks are trained.

    Raises:
        LibraryError: if it holds adapters of these names that are not of these tasks, or of another build.
    """
    path = private_folder(shop.library.path, clusters)
    if path.resolve() == shop.library.path.resolve():
        raise UsageError("--private must not be the library that is built", found=path, remedy="name another folder")
    library = _open_private(path, shop)
    units = private_units(sorted(shop.tasks), clusters.private_settings(settings))
    if clusters.private is not None:
        taken = [name for name in shop.tasks if name in library]
        _check_taken(library, taken, shop)
        units = [unit for unit in units if unit.name not in taken]
    shop.display.say(f"private adapters: {path}")
    with library.build_lock():
        try:
            train_units(replace(shop, library=library), units)
        except LibraryError as error:
            remedy = f"delete the folder {path}, or name another with --private"
            raise LibraryError(error.rule, found=error.found, remedy=remedy) from error
    return library


def private_folder(library: Path, clusters: ClusterSettings) -> Path:
    """Where the private adapters of a library's clusters lie."""
    return library / BUILD_FOLDER / PRIVATE if clusters.private is None else Path(clusters.private)


def _open_private(path: Path, shop: Workshop) -> Library:
    if not path.exists():
        base = shop.base.model if shop.base is not None else shop.base_reference
        return Library.create(path, base, base_name=shop.library.base.name)
    library = Library.open(path)
    if library.base.fingerprint.digest != shop.library.base.fingerprint.digest:
        raise LibraryError(
            f"the library of private adapters '{path}' must be over the base of '{shop.library.path}'",
            found=f"{library.base.name} instead of {shop.library.base.name}",
            remedy="name another with --private",
        )
    return library


def _check_taken(library: Library, names: Sequence[str], shop: Workshop) -> None:
    for name in names:
        known = library.provenance(name)
        hashes = known.get("data_hashes", {name: shop.tasks[name].data_hash})
        if known["tasks"] not in ([], [name]) or hashes != {name: shop.tasks[name].data_hash}:
            raise LibraryError(
                f"adapter '{name}' of library '{library.path}' must be one of task '{name}' as it is now",
                found=f"tasks {known['tasks']}, other data" if known["tasks"] == [name] else f"tasks {known['tasks']}",
                remedy="name another library with --private",
            )


def cluster_tasks(shop: Workshop, private: Library | None, clusters: ClusterSettings, k: int | None) -> Clusters:
    """Assign tasks to clusters and record it in the library.

    Args:
        shop: where.
        private: the private adapters, where these decide.
        clusters: how.
        k: number of clusters; None lets the adapters say.

    Returns:
        The assignment; the same again from the library's record.

    Raises:
        UsageError: if there cannot be that many clusters.
    """
    names = sorted(shop.tasks)
    parents = {} if private is None else {name: str(private.provenance(name)["content_hash"]) for name in names}
    asked: dict[str, Any] = {"k": k or "auto", "by": clusters.by, "method": clusters.method, "seed": clusters.seed}
    key = {
        "adapters": parents,
        "tasks": {name: shop.tasks[name].data_hash for name in names},
        "settings": asked,
    }
    folder = derived_folder(shop.library.path, KIND, key)
    stored = load_derived(shop.library.path, KIND, key)
    if stored is None:
        document = {**_labels(shop, private, clusters, k), **asked}
        save_derived(shop.library.path, KIND, key, {DOCUMENT: encode_json(document)})
        stored = {DOCUMENT: encode_json(document)}
    document = json.loads(stored[DOCUMENT])
    sizes = sorted(list(document["labels"].values()).count(label) for label in set(document["labels"].values()))
    shop.display.say(f"{len(sizes)} clusters of {', '.join(map(str, reversed(sizes)))} tasks: {folder}")
    origin = {**asked, "clusters": folder.name}
    return Clusters(len(sizes) if k is None else k, document["labels"], parents, origin)


def _labels(shop: Workshop, private: Library | None, clusters: ClusterSettings, k: int | None) -> dict[str, Any]:
    """The document of an assignment: labels by task, and what is known about the clusters."""
    if private is not None:
        return _labels_of_adapters(shop, private, clusters, k)
    names = sorted(shop.tasks)
    if clusters.by == "family":
        labels = family_labels([shop.tasks[name].family for name in names])
    elif clusters.by == "random":
        assert k is not None
        labels = random_labels(names, k, clusters.seed)
    else:
        assert k is not None
        labels = text_labels(embed_tasks({name: shop.tasks[name] for name in names}), k, clusters.seed)
    return {"labels": dict(zip(names, labels, strict=True))}


def _labels_of_adapters(shop: Workshop, private: Library, clusters: ClusterSettings, k: int | None) -> dict[str, Any]:
    found = cluster_adapters(sorted(shop.tasks), private.get, k=k or "auto", method=clusters.method, seed=clusters.seed)
    labels = dict(zip(found.names, found.labels, strict=True))
    if found.zero:
        # They resemble nothing, not even each other; but every task must have an expert.
        shop.display.say(f"adapters that learnt nothing share a cluster of their own: {', '.join(found.zero)}")
        labels |= dict.fromkeys(found.zero, found.k)
    return {
        "labels": labels,
        "cohesion": list(found.cohesion),
        "silhouette": found.silhouette,
        "stability": found.stability,
        "zero": list(found.zero),
        "duplicates": [list(group) for group in found.duplicates],
    }
