"""An assignment of tasks to clusters, by their private adapters or by a baseline. It is recorded in the library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.build.cluster_settings import ClusterSettings
from lorary.build.train_units import BuildContext
from lorary.cluster.baselines import family_labels, random_labels, text_labels
from lorary.cluster.mbc import cluster_adapters
from lorary.data.encoder import embed_tasks
from lorary.data.schema import Task
from lorary.display import Display
from lorary.library.derived import derived_folder, load_derived, save_derived
from lorary.library.files import encode_json
from lorary.library.store import Library

# Another kind than that of `lorary cluster`: adapters are clustered there, and tasks here.
KIND, DOCUMENT = "assignment_of_tasks", "assignment.json"
# To be raised when the same adapters, tasks and settings would get another answer: older ones are then not found.
EDITION = 1


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


def cluster_tasks(context: BuildContext, private: Library | None, clusters: ClusterSettings, k: int | None) -> Clusters:
    """Assign tasks to clusters and record it in the library.

    Args:
        context: where.
        private: the private adapters, where these decide.
        clusters: how.
        k: number of clusters; None lets the adapters, or the families, say.

    Returns:
        The assignment; the same again from the library's record.

    Raises:
        UsageError: if there cannot be that many clusters.
    """
    path = context.library.path
    key = _key(context.tasks, private, clusters, k)
    if load_derived(path, KIND, key) is None:
        document = _labels(context.tasks, private, clusters, k, context.display)
        save_derived(path, KIND, key, {DOCUMENT: encode_json({**document, **key["settings"]})})
    assignment = known_clusters(path, context.tasks, private, clusters, k)
    assert assignment is not None
    labels = list(assignment.labels.values())
    sizes = sorted((labels.count(label) for label in set(labels)), reverse=True)
    folder = derived_folder(path, KIND, key)
    context.display.say(f"{len(sizes)} clusters of {', '.join(map(str, sizes))} tasks: {folder}")
    return assignment


def known_clusters(
    library: Path, tasks: Mapping[str, Task], private: Library | None, clusters: ClusterSettings, k: int | None
) -> Clusters | None:
    """The assignment as far as it is known without clustering adapters; nothing is written.

    Args:
        library: folder of the library, which may hold a record; it need not be there.
        tasks: all tasks, by name.
        private: as for `cluster_tasks`.
        clusters: how.
        k: as for `cluster_tasks`.

    Returns:
        What is recorded, or what a baseline says, which needs no adapters; else None.
    """
    key = _key(tasks, private, clusters, k)
    stored = load_derived(library, KIND, key)
    if stored is not None:
        labels = json.loads(stored[DOCUMENT])["labels"]
    elif private is None:
        labels = _labels(tasks, private, clusters, k, Display())["labels"]
    else:
        return None
    origin = {**key["settings"], "clusters": derived_folder(library, KIND, key).name}
    return Clusters(len(set(labels.values())) if k is None else k, labels, key["adapters"], origin)


def _key(
    tasks: Mapping[str, Task], private: Library | None, clusters: ClusterSettings, k: int | None
) -> dict[str, Any]:
    names = sorted(tasks)
    return {
        "adapters": {} if private is None else {n: str(private.provenance(n)["content_hash"]) for n in names},
        "edition": EDITION,
        # The hash of a task's data says nothing about them.
        "families": {name: tasks[name].family for name in names} if clusters.by == "family" else {},
        "settings": {"k": k or "auto", "by": clusters.by, "method": clusters.method, "seed": clusters.seed},
        "tasks": {name: tasks[name].data_hash for name in names},
    }


def _labels(
    tasks: Mapping[str, Task], private: Library | None, clusters: ClusterSettings, k: int | None, display: Display
) -> dict[str, Any]:
    """The document of an assignment: labels by task, and what is known about the clusters."""
    names = sorted(tasks)
    if private is not None:
        return _labels_of_adapters(names, private, clusters, k, display)
    if clusters.by == "family":
        labels = family_labels([tasks[name].family for name in names])
    elif clusters.by == "random":
        assert k is not None
        labels = random_labels(names, k, clusters.seed)
    else:
        assert k is not None
        labels = text_labels(embed_tasks({name: tasks[name] for name in names}), k, clusters.seed)
    return {"labels": dict(zip(names, labels, strict=True))}


def _labels_of_adapters(
    names: list[str], private: Library, clusters: ClusterSettings, k: int | None, display: Display
) -> dict[str, Any]:
    clustering = cluster_adapters(names, private.get, k=k or "auto", method=clusters.method, seed=clusters.seed)
    labels = dict(zip(clustering.names, clustering.labels, strict=True))
    if clustering.zero:
        # They resemble nothing, not even each other; but every task must have an expert.
        display.say(f"adapters that learnt nothing share a cluster of their own: {', '.join(clustering.zero)}")
        labels |= dict.fromkeys(clustering.zero, clustering.k)
    return {
        "labels": labels,
        "cohesion": list(clustering.cohesion),
        "silhouette": clustering.silhouette,
        "stability": clustering.stability,
        "zero": list(clustering.zero),
        "duplicates": [list(group) for group in clustering.duplicates],
    }
