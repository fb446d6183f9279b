"""Comparing adapters in pairs: one table for the three methods."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter
from lorary.cluster.draws import DrawDetector
from lorary.cluster.embed import embedding_of_gram, flattened_gram
from lorary.cluster.similarity import adapter_gram
from lorary.cluster.sketch import DeltaSketcher, delta_sketches
from lorary.ops.gram import cosine_of_gram

# By their whole updates, by the paper's flattened factors, by sketches of their updates.
METHODS = ("delta", "paper-2024", "sketch")
PAPER_SPARSITY = 0.5
PAPER_COMPONENTS = 64
# Probes of the sketches by which equal updates are found, where no cosine is taken from them.
SMALL_SKETCH = 16
# Two updates with a cosine above 1 - SAME_COSINE whose norms differ by less than this share are the same update.
SAME_COSINE = 1e-6
SAME_NORM = 1e-3


@dataclass(frozen=True)
class PairComparison:
    """Norms and pairwise similarities of some adapters.

    Args:
        norms: of their updates; estimates, but 0 only for an update that is zero, where they come from sketches.
        cosines: between their updates.
        flat_gram: inner products of the paper's sparsified, flattened factors; None for the other methods.
        seed: of the paper's SVD.
    """

    norms: Float[Tensor, "experts"]
    cosines: Float[Tensor, "experts experts"]
    flat_gram: Float[Tensor, "experts experts"] | None
    seed: int

    def representatives(self) -> list[int]:
        """For each adapter the first one with the same update (often itself); -1 for a zero update."""
        first = [-1] * len(self.norms)
        for i in range(len(first)):
            if self.norms[i] == 0 or first[i] != -1:
                continue
            first[i] = i
            near = (self.cosines[i, i + 1 :] > 1 - SAME_COSINE).nonzero().flatten() + i + 1
            for j in near[(self.norms[near] / self.norms[i] - 1).abs() < SAME_NORM].tolist():
                first[j] = i if first[j] == -1 else first[j]
        return first

    def similarity(self, chosen: list[int]) -> Float[Tensor, "chosen chosen"]:
        """The cosines by the method, between some adapters only.

        Args:
            chosen: their numbers, ascending, none with a zero update.
        """
        index = torch.tensor(chosen)
        if self.flat_gram is not None:
            embedding = embedding_of_gram(self.flat_gram[index[:, None], index], PAPER_COMPONENTS, self.seed)
            return cosine_of_gram(embedding @ embedding.mT)
        # Ten thousand adapters have 400 MB of cosines: no copy where all are taken.
        return self.cosines if len(chosen) == len(self.norms) else self.cosines[index[:, None], index]


def compare(adapters: Iterable[Adapter], method: str, seed: int) -> PairComparison:
    """Compare all pairs of adapters.

    Args:
        adapters: at least one; consumed one at a time.
        method: one of `METHODS`.
        seed: of the paper's SVD, without effect on the other methods.

    Returns:
        Norms and cosines; in float32 from sketches.

    Raises:
        AdapterError: if a layer has different shapes in two adapters, or different ranks for `paper-2024`.
    """
    if method == "delta":
        gram = adapter_gram(adapters)
        return PairComparison(gram.diagonal().clamp_min(0).sqrt(), cosine_of_gram(gram), None, seed)
    if method == "sketch":
        return PairComparison(*_from_sketches(delta_sketches(adapters)), None, seed)
    return _compare_flattened(adapters, seed)


def _from_sketches(sketches: Tensor) -> tuple[Tensor, Tensor]:
    norms = sketches.norm(dim=1)
    unit = sketches / norms.clamp_min(torch.finfo(sketches.dtype).tiny)[:, None]
    return norms, (unit @ unit.mT).clamp_(-1.0, 1.0).fill_diagonal_(1.0)


def _compare_flattened(adapters: Iterable[Adapter], seed: int) -> PairComparison:
    """The paper's comparison, and sketches beside it: flattened factors cannot tell that two updates are the same."""
    sketcher, detector = DeltaSketcher(SMALL_SKETCH), DrawDetector()
    sketches: list[Tensor] = []

    def observed() -> Iterator[Adapter]:
        for adapter in adapters:
            sketches.append(sketcher(adapter))
            if sketches[-1].any():
                detector.add(adapter)
            yield adapter

    _, flat_gram = flattened_gram(observed(), PAPER_SPARSITY)
    _warn_of_draws(detector)
    return PairComparison(*_from_sketches(torch.stack(sketches)), flat_gram, seed)


def _warn_of_draws(detector: DrawDetector) -> None:
    groups = detector.groups()
    if len(groups) > 1:
        warnings.warn(
            f"adapters '{groups[0][0]}' and '{groups[1][0]}' began from different initial draws of lora_a (there are "
            f"{len(groups)} draws): the flattened factors that 'paper-2024' compares have little in common then, "
            "whatever the adapters compute. Use the method 'delta', or adapters built with one shared draw.",
            stacklevel=2,
        )
