"""The clusters of a library as the contents of a page."""

from importlib.metadata import version
from pathlib import Path

from lorary.cluster.kmeans import Candidate
from lorary.library.clusters import ClusterResult
from lorary.report.cluster_contents import ClusterMap, check_size


def map_of(result: ClusterResult) -> ClusterMap:
    """Gather what the page shows.

    Args:
        result: the clusters of a library.

    Returns:
        The contents of the page, for `lorary.report.clusters.write_map`.

    Raises:
        UsageError: if there are more adapters than a page shows.
    """
    found, names = result.found, result.found["names"]
    if result.cosine is None:
        check_size(len(names))
    assert result.cosine is not None
    kept = [i for i, label in enumerate(found["labels"]) if label >= 0]
    return ClusterMap(
        title=f"Lorary: clusters of {Path(result.library).resolve().name}",
        names=[names[i] for i in kept],
        labels=[found["labels"][i] for i in kept],
        cosine=result.cosine[kept][:, kept],
        cohesion=found["cohesion"],
        method=found["method"],
        families=result.families,
        silhouette=found["silhouette"],
        duplicates=found["duplicates"],
        zero=found["zero"],
        candidates=[Candidate(**candidate) for candidate in found["candidates"]],
        facts=_facts(result),
        versions={package: version(package) for package in ("lorary", "torch", "scikit-learn")},
    )


def _facts(result: ClusterResult) -> dict[str, str]:
    found, with_families = result.found, result.agreement()
    chosen = "chosen by silhouette and stability" if found["is_chosen"] else "as asked for"
    facts = {
        "library": f"{Path(result.library).resolve().name}, {len(found['names'])} adapters",
        "base model": result.base,
        "method": found["method"],
        "clusters": f"{found['k']}, {chosen}",
        "seed": str(found["seed"]),
    }
    if with_families is not None:
        facts["agreement with families"] = (
            f"adjusted Rand {with_families[0]:.2f}, mutual information {with_families[1]:.2f}"
        )
    return facts
