"""Sketches of adapters: short vectors whose inner products estimate those of the whole updates."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter
from lorary.cluster.spill import check_comparable, check_shape
from lorary.keys import keyed_generator

# Probes on each side: 4096 numbers (16 KiB) per adapter.
SIZE = 64


class DeltaSketcher:
    """Maps an adapter to the sum over its layers of `Ω_outᵀ ΔW Ω_in`, a (size, size) matrix, flattened.

    Ω_in (d_in, size) and Ω_out (d_out, size) are random orthonormal columns, scaled so that Ω Ωᵀ is the identity on
    average, drawn per layer. So the inner product of two sketches is `<ΔW_i, ΔW_j>` on average: layers that differ meet
    independent probes, whose products vanish. The sketch is linear in ΔW, hence blind to the gauge, and equal updates
    have equal sketches. It costs two thin products per layer; a cosine's standard error is about
    `sqrt(1 / size² + 4 / (size * layers))`, the second part for updates of rank one.

    Args:
        size: probes on each side.
        seed: of the probes.
    """

    def __init__(self, size: int = SIZE, seed: int = 42) -> None:
        self.size = size
        self.seed = seed
        self._probes: dict[tuple[str, str, int], Tensor] = {}
        self._first: dict[str, tuple[str, tuple[int, int]]] = {}

    def __call__(self, adapter: Adapter) -> Float[Tensor, "numbers"]:
        """The sketch of one adapter.

        Args:
            adapter: of any layers, ranks and float dtype.

        Returns:
            `size`² numbers in float32, or in float64 where the adapter has it.

        Raises:
            AdapterError: if a layer has another shape than it had in an adapter before.
        """
        check_comparable(adapter)
        total = torch.zeros(self.size, self.size)
        for path, factors in adapter:
            shape = (factors.d_in, factors.d_out)
            first_name, first_shape = self._first.setdefault(path, (adapter.name, shape))
            check_shape((first_name, adapter.name), path, first_shape, shape)
            dtype = torch.promote_types(factors.lora_a.dtype, torch.float32)
            right = factors.lora_a.to(dtype) @ self._probe(path, "in", factors.d_in).to(dtype)
            left = factors.lora_b.to(dtype).mT @ self._probe(path, "out", factors.d_out).to(dtype)
            total = total + factors.scaling * (left.mT @ right)
        return total.flatten()

    def _probe(self, path: str, side: str, features: int) -> Tensor:
        key = (path, side, features)
        if key not in self._probes:
            self._probes[key] = _random_frame(features, self.size, keyed_generator("sketch", self.seed, *key))
        return self._probes[key]


def delta_sketches(
    adapters: Iterable[Adapter], *, size: int = SIZE, seed: int = 42
) -> Float[Tensor, "experts numbers"]:
    """The sketches of many adapters, one row each.

    Args:
        adapters: at least one; consumed one at a time, none is kept.
        size: probes on each side.
        seed: of the probes.

    Returns:
        `size`² numbers a row; rows @ rowsᵀ estimates the inner products of the updates without bias.

    Raises:
        AdapterError: if a layer has different shapes in two adapters.
    """
    sketcher = DeltaSketcher(size, seed)
    return torch.stack([sketcher(adapter) for adapter in adapters])


def _random_frame(features: int, size: int, generator: torch.Generator) -> Float[Tensor, "features size"]:
    """Random orthonormal columns times sqrt(features / size), or orthonormal rows where there are fewer features."""
    draw = torch.randn(max(features, size), min(features, size), generator=generator, dtype=torch.float64)
    frame, triangle = torch.linalg.qr(draw)
    frame = frame * triangle.diagonal().sign()  # without it the frame would not be uniform, and not zero on average
    return (frame * (features / size) ** 0.5 if features > size else frame.mT).float().contiguous()
