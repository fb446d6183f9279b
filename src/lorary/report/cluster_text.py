"""The clusters of a library as tables in the terminal."""

from rich.markup import escape
from rich.table import Table

from lorary.display import table_console
from lorary.library.clusters import ClusterResult
from lorary.report.tables import text_table

NUM_NEAREST = 3
# The neighbours of more adapters fill screens that nobody reads; --json and --report have them.
NUM_LISTED = 100


def print_clusters(result: ClusterResult) -> None:
    """Print clusters with members and cohesion, each adapter's nearest others, duplicates and zero adapters.

    Args:
        result: the clusters of a library.
    """
    console = table_console()
    console.print(_clusters(result))
    if len(result.labels) <= NUM_LISTED:
        console.print(_nearest(result))
    for line in _lines(result):
        # Paths are to be copied: they are never broken.
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _clusters(result: ClusterResult) -> Table:
    document = result.document
    title = f"{document['k']} clusters of {len(document['names'])} adapters"
    table = text_table(title, ">cluster", ">adapters", ">cohesion", "<members")
    for cluster, cohesion in enumerate(document["cohesion"]):
        members = [name for name, label in result.labels.items() if label == cluster]
        table.add_row(str(cluster), str(len(members)), _number(cohesion), escape(", ".join(members)))
    return table


def _nearest(result: ClusterResult) -> Table:
    table = text_table("nearest neighbours, by cosine", "<adapter", ">cluster", "<nearest")
    labels = result.labels
    for name in sorted(labels, key=lambda name: (labels[name] < 0, labels[name], name)):
        nearest = result.document["nearest"][name][:NUM_NEAREST]
        shown = ", ".join(f"{neighbour} {cosine:.2f}" for neighbour, cosine in nearest)
        table.add_row(escape(name), str(labels[name]) if labels[name] >= 0 else "-", escape(shown))
    return table


def _lines(result: ClusterResult) -> list[str]:
    document, agreement = result.document, result.agreement()
    silhouette, method, seed = _number(document["silhouette"]), document["method"], document["seed"]
    lines = [f"mean silhouette {silhouette}, method {method}, seed {seed}"]
    if document["is_chosen"]:
        tried = ", ".join(f"{c['k']} ({c['silhouette']:.2f}, {c['stability']:.2f})" for c in document["candidates"])
        lines.append(f"k chosen among, with silhouette and stability: {tried}")
    if agreement is not None:
        rand, information = agreement
        lines.append(f"agreement with families: adjusted Rand {rand:.2f}, mutual information {information:.2f}")
    lines += [f"duplicates, the same update: {', '.join(group)}" for group in document["duplicates"]]
    if document["zero"]:
        lines.append(f"zero adapters, in no cluster: {', '.join(document['zero'])}")
    if len(document["names"]) > NUM_LISTED:
        lines.append(f"nearest neighbours of {len(document['names']):,} adapters: see --json or --report")
    if result.folder is not None:
        lines.append(f"{'answered from' if result.is_stored else 'stored in'} {result.folder}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
