"""How the data of a rule is measured: what a file of this room hands to the catalogue."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorary.data.template import Example
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.prepare.settings import PrepareSettings

# By the path of the layer, or `lorary.model.prepared.REQUEST`.
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class MeasureContext:
    """What every measure may look at.

    Args:
        base: the bare base model; a measure leaves it as it was.
        library: the experts.
        settings: what to prepare.
    """

    base: Base
    library: Library
    settings: PrepareSettings


@dataclass(frozen=True)
class Measure:
    """How the data of a rule is measured: expert by expert, from the rows of all at once, or from kept samples.

    Args:
        per_expert: name of an expert and its rows -> its tensors, and notes on how it went, as values of JSON.
        pooled: for joint data: the rows of all experts -> the tensors of each.
        fit: for joint data: what `per_expert` gave for all experts, kept under `samples_FEATURES` -> tensors of each.
        decided_by: fields of `PrepareSettings` that decide the tensors, beside those that decide all data.
    """

    per_expert: Callable[[MeasureContext, str, Sequence[Example]], tuple[Tensors, dict[str, Any]]] | None = None
    pooled: Callable[[MeasureContext, Mapping[str, Sequence[Example]]], Mapping[str, Tensors]] | None = None
    fit: Callable[[Mapping[str, Tensors]], Mapping[str, Tensors]] | None = None
    decided_by: tuple[str, ...] = ()
