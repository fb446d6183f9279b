"""Clusters that somebody else stored: of the kinds that all who show them rely on, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorary.errors import LibraryError
from lorary.library.cluster_document import COSINES, DOCUMENT, parse_clusters

NAMES = ["a", "b", "c"]
WHOLE: dict[str, Any] = {
    "names": NAMES, "labels": [0, 1, -1], "k": 2, "cohesion": [0.5, None], "silhouette": 0.1, "stability": None,
    "method": "delta", "seed": 42, "is_chosen": True, "warnings": [], "zero": ["c"], "duplicates": [["a", "b"]],
    "nearest": {"a": [["b", 0.5]], "b": [["a", 0.5]], "c": []},
    "candidates": [{"k": 2, "silhouette": 0.1, "stability": None}], "more": 1,
}  # fmt: skip
EYE = safetensors.torch.save({"cosine": torch.eye(3)})


def parsed(cosines: bytes | None = EYE, **changes: Any) -> tuple[dict[str, Any], torch.Tensor | None]:
    files = {DOCUMENT: json.dumps(WHOLE | changes).encode(), **({COSINES: cosines} if cosines else {})}
    return parse_clusters(files, NAMES, Path("derived/clusters-1"))


def test_what_was_stored_is_read() -> None:
    document, cosines = parsed()
    assert document == WHOLE
    assert cosines is not None
    assert torch.equal(cosines, torch.eye(3))
    assert parsed(None) == (WHOLE, None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("names", ["a", "b"]), ("labels", [0, 1]), ("labels", [0, 1, 2]), ("labels", [0, 1, True]), ("labels", None),
        ("k", 4), ("k", -1), ("k", True), ("k", "2"), ("cohesion", [0.5]), ("cohesion", [0.5, "x"]), ("cohesion", 3),
        ("silhouette", "x"), ("stability", [1]), ("method", None), ("seed", 1.5), ("is_chosen", 1), ("warnings", [3]),
        ("zero", ["d"]), ("zero", [["a"]]), ("duplicates", ["ab"]), ("duplicates", [["d"]]), ("nearest", {}),
        ("nearest", {"a": [["d", 1.0]], "b": [], "c": []}), ("nearest", {"a": [["b"]], "b": [], "c": []}),
        ("candidates", [{}]), ("candidates", [{"k": 2, "silhouette": "x", "stability": None}]),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(field: str, value: Any) -> None:
    with pytest.raises(LibraryError, match=rf"derived/clusters-1 must hold clusters.json(?s:.)*{field} = "):
        parsed(**{field: value})


@pytest.mark.parametrize(
    "cosines",
    [
        safetensors.torch.save({"cosine": torch.eye(2)}),
        safetensors.torch.save({"cosine": torch.full((3, 3), float("nan"))}),
        safetensors.torch.save({"cosine": torch.eye(3, dtype=torch.int64)}),
        safetensors.torch.save({"cosine": torch.eye(3).to(torch.float8_e4m3fn)}),
        safetensors.torch.save({"other": torch.eye(3)}),
        EYE[:-1],
        EYE + b"x",
    ],
)
def test_cosines_that_are_none_are_refused(cosines: bytes) -> None:
    with pytest.raises(LibraryError, match=r"must hold clusters.json as Lorary writes it, and cosines.safetensors"):
        parsed(cosines)


@pytest.mark.parametrize("files", [{}, {DOCUMENT: b"[]"}, {DOCUMENT: b"{"}, {DOCUMENT: b""}])
def test_a_missing_or_damaged_document_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(LibraryError, match=r"must hold clusters.json"):
        parse_clusters(files, NAMES, Path("x"))
