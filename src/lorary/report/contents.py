"""What a report can hold. Every section but the title may be left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lorary.errors import ShapeError, UsageError
from lorary.evaluate.finite import furthest
from lorary.evaluate.routed_prompt import RoutedPrompt


@dataclass(frozen=True)
class Similarity:
    """How alike the experts of a library are.

    Args:
        names: of the experts, in the order of the matrix.
        family: of each expert, by name; experts that are missing count as `other`.
        cosine: symmetric, -1..1.

    Raises:
        ShapeError: if the names do not fit the matrix.
        UsageError: if the matrix holds a value that is no cosine.
    """

    names: Sequence[str]
    family: Mapping[str, str]
    cosine: Float[Tensor, "experts experts"]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.cosine):
            raise ShapeError(
                "a similarity matrix must have one row per name", found=f"{len(self.names)}, {len(self.cosine)}"
            )
        # A hair of rounding is allowed; the comparison is false for NaN.
        if not bool((self.cosine.abs() <= 1 + 1e-3).all()):
            raise UsageError("a similarity must be a cosine, -1..1", found=furthest(self.cosine))


@dataclass(frozen=True)
class Report:
    """One page.

    Args:
        title: the heading.
        facts: what was run, as label and value (base model, library, settings).
        evaluation: the document of `lorary evaluate --json`.
        similarity: of the library's experts.
        routings: traced prompts.
        losses: validation loss of the base and of the expert, in nats per target token, by the expert's name.
        versions: of the software, by package.

    Raises:
        UsageError: if a loss is not a finite number.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    similarity: Similarity | None = None
    routings: Sequence[RoutedPrompt] = ()
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, pair in self.losses.items():
            if not all(isfinite(value) for value in pair):
                raise UsageError(f"the validation losses of expert '{name}' must be finite numbers", found=pair)

    @property
    def cells(self) -> Sequence[Mapping[str, Any]]:
        """The cells of the evaluation; empty without an evaluation."""
        return self.evaluation["cells"] if self.evaluation else ()

    def families(self) -> dict[str, str]:
        """Family of each expert by name: as the similarities say, else that of the task of the same name."""
        by_task = {str(cell["task"]): str(cell["family"]) for cell in self.cells}
        return {**by_task, **(self.similarity.family if self.similarity else {})}
