"""What stands beside a routed adapter: whose columns its ranks are, and how they are gated (`lorary_routing.json`)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorary.errors import AdapterError
from lorary.numbers import is_number
from lorary.reading import parse_json, read_regular

ROUTING_FILE = "lorary_routing.json"
FORMAT_VERSION = 1
_REMEDY = "export the library again"
# Rules that read nothing but the low-rank buffer, where the experts' factors are written for it.
RULES = ("arrow", "projection", "norm")


@dataclass(frozen=True)
class RoutedLayout:
    """One adapter whose ranks belong to several experts.

    Its columns are the ranks of the first expert, of the second, ..., then one column for the score of each expert.

    Args:
        router: one of `RULES`.
        top_k: experts per token and layer.
        temperature: divides the scores.
        experts: names, in the order of their columns.
        ranks: columns of each expert, the same in every layer; an expert of smaller rank there has zeros.
        content_hash: sha256 of what the adapter computes, as of the folder's two files.
    """

    router: str
    top_k: int
    temperature: float
    experts: tuple[str, ...]
    ranks: tuple[int, ...]
    content_hash: str

    @property
    def num_ranks(self) -> int:
        """Columns that experts have."""
        return sum(self.ranks)

    @property
    def num_columns(self) -> int:
        """All columns: the rank of the adapter."""
        return self.num_ranks + len(self.experts)

    def encode(self) -> bytes:
        """The content of the file; equal layouts give equal bytes."""
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_layout(folder: str | Path) -> RoutedLayout | None:
    """The layout of the adapter in a folder.

    Args:
        folder: of a PEFT adapter.

    Returns:
        None where the adapter is an ordinary one: nothing stands beside it.

    Raises:
        AdapterError: if the file is damaged, or a newer Lorary wrote it.
    """
    path = Path(folder) / ROUTING_FILE
    try:
        document = parse_json(read_regular(path, follow_links=True))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} must hold one JSON object", found=error, remedy="export the library again"
        ) from error
    return _layout_of(document, path)


def _layout_of(document: Any, path: Path) -> RoutedLayout:
    names = {field.name for field in fields(RoutedLayout)}
    is_ours = isinstance(document, Mapping) and document.get("format_version") == FORMAT_VERSION
    if not is_ours or names - set(document):
        raise AdapterError(
            f"{path} must be of format version {FORMAT_VERSION} and say {sorted(names)}",
            found=sorted(document) if isinstance(document, Mapping) else type(document).__name__,
            remedy="export the library again with the installed version of Lorary",
        )
    if problem := _problem(**{name: document[name] for name in names}):
        raise AdapterError(f"{path} must say how a routed adapter is gated", found=problem, remedy=_REMEDY)
    return RoutedLayout(
        document["router"], document["top_k"], float(document["temperature"]), tuple(document["experts"]),
        tuple(document["ranks"]), document["content_hash"],
    )  # fmt: skip


def _problem(router: Any, top_k: Any, temperature: Any, experts: Any, ranks: Any, content_hash: Any) -> str | None:
    """What is wrong with values from a file."""
    if router not in RULES:
        return f"router {router!r}, which is none of {list(RULES)}"
    if type(top_k) is not int or top_k < 1:
        return f"top_k {top_k!r}"
    if not (is_number(temperature) and temperature > 0):
        return f"temperature {temperature!r}"
    if not (_are(experts, str) and _are(ranks, int) and len(experts) == len(ranks) and min(ranks) >= 1):
        return f"experts {experts!r:.80} and ranks {ranks!r:.80}"
    return None if isinstance(content_hash, str) else f"content_hash {content_hash!r}"


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)
