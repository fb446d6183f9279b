"""Which adapters began from the same random lora_a, as far as their factors show it."""

import torch
from torch import Tensor

from lorary.adapter import Adapter

# Numbers looked at per layer: a few thousand per adapter tell a shared draw from independent ones.
NUMBERS_PER_LAYER = 64
# Cosine above which two adapters share a draw. Training moves lora_a little, so that it stays above 0.8 in short runs.
SHARED = 0.2
# The same in standard errors of independent draws, for adapters so small that chance goes beyond `SHARED`.
STANDARD_ERRORS = 5.0


class DrawDetector:
    """Collects a sample of each adapter's lora_a, then groups the adapters by their initial draw."""

    def __init__(self) -> None:
        self._samples: list[tuple[str, dict[str, Tensor]]] = []

    def add(self, adapter: Adapter) -> None:
        """Take the sample of one adapter.

        Args:
            adapter: any; only the first numbers of each lora_a are kept.
        """
        sample = {path: factors.lora_a.flatten()[:NUMBERS_PER_LAYER].float().clone() for path, factors in adapter}
        self._samples.append((adapter.name, sample))

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names by initial draw, the largest group first. A gauge changed after training counts as another draw.

        lora_a begins as noise and training moves it little, so two adapters of one draw have a cosine near 1 between
        their lora_a, and two of independent draws 0 within `1 / sqrt(numbers)`.
        """
        if not self._samples:
            return ()
        rows = self._matrix()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        threshold = max(SHARED, STANDARD_ERRORS / rows.shape[1] ** 0.5)
        labels = _components(rows @ rows.mT > threshold)
        members: dict[int, list[str]] = {}
        for label, (name, _) in zip(labels, self._samples, strict=True):
            members.setdefault(label, []).append(name)
        return tuple(sorted((tuple(group) for group in members.values()), key=lambda group: (-len(group), group)))

    def _matrix(self) -> Tensor:
        """The samples as rows, zeros where an adapter lacks a layer."""
        widths: dict[str, int] = {}
        for _, sample in self._samples:
            for path, numbers in sample.items():
                widths[path] = max(widths.get(path, 0), numbers.numel())
        rows = torch.zeros(len(self._samples), sum(widths.values()))
        for row, (_, sample) in zip(rows, self._samples, strict=True):
            for part, path in zip(row.split(list(widths.values())), widths, strict=True):
                if path in sample:
                    part[: sample[path].numel()] = sample[path]
        return rows


def _components(linked: Tensor) -> list[int]:
    """Connected components of a symmetric relation."""
    from scipy.sparse.csgraph import connected_components  # scipy takes a while to import

    _, labels = connected_components(linked.numpy(), directed=False)
    return [int(label) for label in labels]
