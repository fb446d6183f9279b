"""A stored clustering as it is read: of the kinds that all who show it rely on, whoever wrote it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorary.errors import LibraryError
from lorary.formats.peft_files import load_tensors
from lorary.numbers import is_number
from lorary.ops.finite import is_finite
from lorary.reading import parse_json

DOCUMENT = "clusters.json"
COSINES = "cosines.safetensors"


def parse_clusters(
    files: Mapping[str, bytes], names: Sequence[str], folder: Path
) -> tuple[dict[str, Any], Tensor | None]:
    """The document of a clustering, and the cosines beside it where there are any.

    Args:
        files: content by file name.
        names: of the adapters, in canonical order.
        folder: where the files lie, for the error.

    Returns:
        The document, and float32 cosines (experts, experts).

    Raises:
        LibraryError: if it is not what `cluster_library` writes.
    """
    try:
        document = parse_json(files[DOCUMENT])
        if not isinstance(document, dict):
            raise TypeError(f"{DOCUMENT} holds a {type(document).__name__}")
        if wrong := _wrong_field(document, names):
            raise ValueError(f"{wrong} = {str(document.get(wrong))[:100]}")
        cosines = load_tensors(files[COSINES])["cosine"] if COSINES in files else None
        if cosines is not None and (
            cosines.dtype != torch.float32 or tuple(cosines.shape) != (len(names),) * 2 or not is_finite(cosines)
        ):
            raise ValueError(f"cosines {tuple(cosines.shape)} of {len(names)} adapters")
    except (KeyError, TypeError, ValueError) as error:
        raise LibraryError(
            f"{folder} must hold {DOCUMENT} as Lorary writes it, and {COSINES} where there is one",
            found=f"{type(error).__name__}: {error}",
            remedy="delete the folder: the clusters are computed again",
        ) from error
    return document, cosines


def _wrong_field(document: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first field that is missing or of another kind."""
    k, given = document.get("k"), set(names)
    number = type(k) is int and 0 <= k <= len(names) and k
    checks = {
        "names": document.get("names") == list(names),
        "k": number is not False,
        "labels": _are(document.get("labels"), lambda label: type(label) is int and -1 <= label < number)
        and len(document["labels"]) == len(names),
        "cohesion": _are(document.get("cohesion"), _is_number_or_none) and len(document["cohesion"]) == number,
        "silhouette": _is_number_or_none(document.get("silhouette", "")),
        "stability": _is_number_or_none(document.get("stability", "")),
        "method": isinstance(document.get("method"), str),
        "seed": type(document.get("seed")) is int,
        "is_chosen": type(document.get("is_chosen")) is bool,
        "warnings": _are(document.get("warnings"), lambda text: isinstance(text, str)),
        "zero": _are(document.get("zero"), lambda name: _is_name(name, given)),
        "duplicates": _are(document.get("duplicates"), lambda group: _are(group, lambda name: _is_name(name, given))),
        "nearest": isinstance(document.get("nearest"), dict)
        and document["nearest"].keys() == given
        and all(_are(pairs, lambda pair: _is_neighbour(pair, given)) for pairs in document["nearest"].values()),
        "candidates": _are(document.get("candidates"), _is_candidate),
    }
    return next((field for field, is_right in checks.items() if not is_right), None)


def _are(values: Any, is_one: Any) -> bool:
    return isinstance(values, list) and all(map(is_one, values))


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_number(value)


def _is_name(value: Any, names: set[str]) -> bool:
    return isinstance(value, str) and value in names


def _is_neighbour(pair: Any, names: set[str]) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and _is_name(pair[0], names) and is_number(pair[1])


def _is_candidate(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"k", "silhouette", "stability"}
        and type(value["k"]) is int
        and _is_number_or_none(value["silhouette"])
        and _is_number_or_none(value["stability"])
    )
