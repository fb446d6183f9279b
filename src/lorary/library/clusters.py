"""The clusters of a library's adapters, by what these compute. No data, no base model is loaded.

The answer is kept in `derived/clusters-HASH/`, keyed by the content hashes of the adapters and the settings, so that
a second call answers at once and a changed adapter asks for another key.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save as encode_tensors
from torch import Tensor

from lorary.adapter import Adapter
from lorary.cluster.agreement import ClusterAgreement, agreement
from lorary.cluster.mbc import Clustering, cluster_adapters
from lorary.data.schema import NO_FAMILY
from lorary.display import Display
from lorary.errors import LibraryError
from lorary.library.cluster_document import COSINES, DOCUMENT, parse_clusters
from lorary.library.cluster_options import AUTO
from lorary.library.derived import derived_folder, iterate_derived, load_derived, save_derived
from lorary.library.files import encode_json, reported
from lorary.library.handles import opened
from lorary.library.layout import check_places
from lorary.library.store import Library
from lorary.library.target_groups import different_targets
from lorary.tabular import ResultTable, Tabular

KIND = "clusters"
# To be raised when the same adapters and settings would get another answer: older ones are then not found any more.
EDITION = 2
# Adapters whose cosines are kept, for a map: of ten thousand they would take 400 MB.
MOST_MAPPED = 1000


@dataclass(frozen=True, repr=False)
class ClusterResult(Tabular):
    """The clusters of a library.

    Args:
        library: the library's folder.
        base: name of its base model.
        document: as it is stored: names, labels, k, cohesion, silhouette, ... (see docs/clusters.md).
        cosine: similarity of all adapters in the order of the names, float32; None where there are too many for a map.
        families: family of each adapter whose provenance knows exactly one.
        folder: where the document lies; None where the library cannot be written.
        is_stored: whether the answer was there already.
    """

    library: str
    base: str
    document: Mapping[str, Any]
    cosine: Tensor | None
    families: Mapping[str, str]
    folder: Path | None
    is_stored: bool

    @property
    def labels(self) -> dict[str, int]:
        """Cluster of each adapter by name; -1 for those that compute nothing."""
        return dict(zip(self.document["names"], self.document["labels"], strict=True))

    def tables(self) -> list[ResultTable]:
        """The clusters with their members."""
        numbers = [*range(self.document["k"]), *([-1] if self.document["zero"] else [])]
        cohesion = {**dict(enumerate(self.document["cohesion"])), -1: None}
        members = {number: [name for name, label in self.labels.items() if label == number] for number in numbers}
        lines = [(n if n >= 0 else None, len(members[n]), cohesion[n], ", ".join(members[n])) for n in numbers]
        silhouette = self.document["silhouette"]
        title = f"{self.library}: {self.document['k']} clusters" + (
            f", mean silhouette {silhouette:.3f}" if silhouette is not None else ""
        )
        return [ResultTable(title, ("cluster", "adapters", "cohesion", "members"), lines)]

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each adapter: its cluster, its family, and the most similar other one."""
        nearest = {name: pairs[0] if pairs else (None, None) for name, pairs in self.document["nearest"].items()}
        return [
            {"adapter": name, "cluster": label, "family": self.families.get(name), "nearest": other, "cosine": cosine}
            for (name, label), (other, cosine) in zip(self.labels.items(), nearest.values(), strict=True)
        ]

    def agreement(self) -> ClusterAgreement | None:
        """How far clusters and families agree; None where fewer than two families are known."""
        labels = self.labels
        clustered = [name for name in self.families if labels[name] >= 0]
        families = [self.families[name] for name in clustered]
        return agreement([labels[name] for name in clustered], families) if len(set(families)) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """The document of `lorary cluster --json`."""
        fields = {key: value for key, value in self.document.items() if key not in ("names", "labels")}
        with_families = self.agreement()
        return {
            **fields,
            "library": self.library,
            "assignments": self.labels,
            "families": dict(self.families),
            "agreement": None if with_families is None else with_families._asdict(),
            "folder": None if self.folder is None else str(self.folder),
            "is_stored": self.is_stored,
        }


def cluster_library(
    library: Library, *, k: int | Literal["auto"] = "auto", method: str = "delta", seed: int = 42
) -> ClusterResult:
    """Cluster the adapters of a library, or find the answer of an earlier call.

    Args:
        library: the library; imported adapters are as good as any.
        k: number of clusters, or `auto`.
        method: `delta`, `paper-2024` or `sketch`, see `lorary.cluster.mbc.cluster_adapters`.
        seed: of k-means and of the paper's SVD.

    Returns:
        The clusters.

    Raises:
        LibraryError: if there is no library, it has fewer than two adapters, or a stored answer is damaged.
        UsageError: if an option is out of range, or there are fewer distinct adapters than clusters.
        AdapterError: if an adapter is damaged, or two cannot be compared by the method.
    """
    provenances = _provenances(library)
    if len(provenances) < 2:
        raise LibraryError(
            f"library {library.path} must have at least two adapters to cluster",
            found=len(provenances),
            remedy=f"add some with `lorary library add {library.path} PATH`",
        )
    key = {"adapters": _hashes(provenances), "edition": EDITION, "k": k, "method": method, "seed": seed}
    files = load_derived(library.path, KIND, key)
    is_stored = files is not None
    if files is None:
        files = _encoded(*_cluster(library, k, method, seed))
        is_kept = _keep(library, key, files)
    folder = derived_folder(library.path, KIND, key) if is_stored or is_kept else None
    return _result(library, provenances, files, folder, is_stored=is_stored)


def stored_clusters(library: Library) -> ClusterResult | None:
    """Clusters of the adapters as they are now that an earlier call stored; None where there are none.

    Of several, those whose number was chosen come first, then those by the method `delta`.

    Args:
        library: the library.

    Raises:
        LibraryError: if an adapter cannot be read, or a stored answer is damaged.
    """
    provenances = _provenances(library)
    now = {"adapters": _hashes(provenances), "edition": EDITION}
    found = [
        entry for entry in iterate_derived(library.path, KIND) if {part: entry.key.get(part) for part in now} == now
    ]
    if not found:
        return None
    entry = min(found, key=lambda entry: (entry.key.get("k") != AUTO, entry.key.get("method") != "delta"))
    folder = derived_folder(library.path, KIND, entry.key)
    return _result(library, provenances, entry.files, folder, is_stored=True)


def _provenances(library: Library) -> dict[str, dict[str, Any]]:
    _check_readable(library)
    return {name: library.provenance(name) for name in library.names()}


def _hashes(provenances: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: provenance["content_hash"] for name, provenance in provenances.items()}


def _result(
    library: Library,
    provenances: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, bytes],
    folder: Path | None,
    *,
    is_stored: bool,
) -> ClusterResult:
    document, cosine = parse_clusters(files, list(provenances), folder or library.path)
    for message in document["warnings"]:
        warnings.warn(message, stacklevel=3)
    families = {name: family for name, provenance in provenances.items() if (family := _family(provenance)) is not None}
    return ClusterResult(
        library=str(library.path),
        base=library.base.name,
        document=document,
        cosine=cosine,
        families=families,
        folder=folder,
        is_stored=is_stored,
    )


def _cluster(library: Library, k: int | Literal["auto"], method: str, seed: int) -> tuple[Clustering, dict[str, Any]]:
    """The clusters, and what belongs into their document beside them: settings, and warnings to repeat each time."""
    names = library.names()
    with warnings.catch_warnings(record=True) as caught, Display().bar("reading adapters", len(names)) as bar:
        warnings.simplefilter("always")

        def load(name: str) -> Adapter:
            adapter = library.get(name)
            bar.advance(name)
            return adapter

        clustering = cluster_adapters(names, load, k=k, method=method, seed=seed)
    # Ours only: what packages deprecate says nothing about the clusters.
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    if groups := different_targets({name: library.shapes(name) for name in names}):
        messages.append(f"the adapters adapt different layers, and clusters follow that before all else: {groups}")
    settings = {"seed": seed, "is_chosen": k == "auto", "warnings": messages}
    return clustering, settings


def _encoded(clustering: Clustering, settings: Mapping[str, Any]) -> dict[str, bytes]:
    document = {
        **settings,
        "names": list(clustering.names),
        "labels": list(clustering.labels),
        "k": clustering.k,
        "method": clustering.method,
        "cohesion": list(clustering.cohesion),
        "silhouette": clustering.silhouette,
        "stability": clustering.stability,
        "zero": list(clustering.zero),
        "duplicates": [list(group) for group in clustering.duplicates],
        "nearest": {name: [list(pair) for pair in pairs] for name, pairs in clustering.nearest.items()},
        "candidates": [{"k": c.k, "silhouette": c.silhouette, "stability": c.stability} for c in clustering.candidates],
    }
    files = {DOCUMENT: encode_json(document)}
    if len(clustering.names) <= MOST_MAPPED:
        files[COSINES] = encode_tensors({"cosine": clustering.similarity.float().contiguous()})
    return files


def _check_readable(library: Library) -> None:
    """Clusters are of all adapters or none: those that cannot be read are named, all at once."""
    with reported(library.path), opened(library.path) as root:
        check_places(root)  # a link is no mere hindrance to storing the answer: it is said before the work
    _, problems = library.listing()
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        named = "; ".join(f"'{name}': {error.rule}" for name, error in list(problems.items())[:10])
        raise LibraryError(
            f"all adapters of library {library.path} must be readable to be clustered",
            found=f"{len(problems)} that are not: {named}",
            remedy=f"restore or remove them: lorary library verify {library.path}",
        )


def _keep(library: Library, key: Mapping[str, Any], files: Mapping[str, bytes]) -> bool:
    """Store an answer; a library that cannot be written, such as a shared one, gets its answer all the same."""
    try:
        save_derived(library.path, KIND, key, files)
    except LibraryError as error:
        warnings.warn(f"the clusters are not stored: {error.rule} (found: {error.found})", stacklevel=2)
        return False
    return True


def _family(provenance: Mapping[str, Any]) -> str | None:
    """The one family of an adapter's tasks; None where there are several, or nobody said."""
    families = provenance.get("families")  # of an imported adapter: anybody's
    values = {str(family) for family in families.values()} if isinstance(families, dict) else set()
    return values.pop() if len(values) == 1 and values != {NO_FAMILY} else None
