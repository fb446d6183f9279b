"""The factors of many adapters in a temporary file, written adapter by adapter and read back layer by layer."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, cast

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.adapter import Adapter, check_low_rank
from lorary.errors import AdapterError, UsageError

Factors = tuple[
    Tensor, Tensor
]  # lora_a (rank, d_in) and the transpose of lora_b (rank, d_out), both float32 or float64


@dataclass(frozen=True)
class _Entry:
    """Where the factors of one adapter for one layer lie in the file."""

    expert: int
    offset: int
    rank: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LayerFactors:
    """One layer of all adapters.

    Args:
        lora_a: rank-concatenated down-projections, in float64 where any adapter has it.
        lora_b_t: rank-concatenated, transposed up-projections.
        experts: number of the adapter, for each that has the layer.
        ranks: its rank there.
    """

    lora_a: Float[Tensor, "ranks d_in"]
    lora_b_t: Float[Tensor, "ranks d_out"]
    experts: list[int]
    ranks: list[int]

    @property
    def expert_of_rank(self) -> Tensor:
        """(ranks,) int64, the adapter that each rank belongs to."""
        return torch.tensor(self.experts).repeat_interleave(torch.tensor(self.ranks))


@dataclass
class _Layer:
    """What is known of one layer so far."""

    d_in: int
    d_out: int
    first: str
    entries: list[_Entry] = field(default_factory=list)


class FactorSpill:
    """A temporary file that turns adapters (all layers of one) into layers (one layer of all).

    Similarities need one layer of all adapters at a time, adapters arrive one at a time, and a thousand of them do not
    fit into memory. The system keeps as much of the file in its cache as there is room for, and the file has no name
    to be left behind. Use it in a `with` statement.
    """

    def __init__(self) -> None:
        # It lives as long as this object: `__exit__` closes it.
        self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="lorary-factors-"))  # noqa: SIM115
        self._layers: dict[str, _Layer] = {}
        self._size = 0
        self.num_experts = 0

    def __enter__(self) -> "FactorSpill":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def paths(self) -> list[str]:
        """The layers that at least one adapter has, in order of their paths."""
        return sorted(self._layers)

    def add(self, name: str, modules: Mapping[str, Factors]) -> None:
        """Append the factors of the next adapter.

        Args:
            name: of the adapter, for errors.
            modules: its factors by layer.

        Raises:
            AdapterError: if a layer has another shape than it has in an adapter before.
            UsageError: if the temporary folder is full.
        """
        try:
            for path, (lora_a, lora_b_t) in modules.items():
                layer = self._layers.setdefault(path, _Layer(lora_a.shape[1], lora_b_t.shape[1], name))
                check_shape((layer.first, name), path, (layer.d_in, layer.d_out), (lora_a.shape[1], lora_b_t.shape[1]))
                layer.entries.append(_Entry(self.num_experts, self._size, lora_a.shape[0], lora_a.dtype))
                for factor in (lora_a, lora_b_t):
                    self._size += self._file.write(factor.contiguous().numpy().data)
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"the temporary folder '{tempfile.gettempdir()}' must have room for the factors of all adapters",
                found=error,
                remedy="set TMPDIR to a folder with more room, or use the method 'sketch', which needs none",
            ) from error
        self.num_experts += 1

    def layer(self, path: str) -> LayerFactors:
        """Read one layer of all adapters that have it.

        Args:
            path: one of `paths`.
        """
        layer = self._layers[path]
        ranks = [entry.rank for entry in layer.entries]
        dtype = torch.float64 if any(entry.dtype == torch.float64 for entry in layer.entries) else torch.float32
        lora_a, lora_b_t = (
            torch.empty(sum(ranks), layer.d_in, dtype=dtype),
            torch.empty(sum(ranks), layer.d_out, dtype=dtype),
        )
        start = 0
        for entry in layer.entries:
            self._file.seek(entry.offset)
            for whole in (lora_a, lora_b_t):
                self._read(whole[start : start + entry.rank], entry.dtype)
            start += entry.rank
        return LayerFactors(lora_a, lora_b_t, [entry.expert for entry in layer.entries], ranks)

    def _read(self, target: Tensor, dtype: torch.dtype) -> None:
        """Read the next numbers of the file, which are of a dtype, into a tensor of this dtype or a wider one."""
        buffer = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
        self._file.readinto(buffer.numpy().data)  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        if buffer is not target:
            target.copy_(buffer)


def check_comparable(adapter: Adapter) -> None:
    """Refuse an adapter whose update is not in its factors. A bias beside lora_b acts on no input and is left out.

    Args:
        adapter: to compare with others.

    Raises:
        AdapterError: if it is a DoRA: its update is of full rank, and holds the base's own weights.
    """
    check_low_rank(
        adapter.name, adapter.modules, "be compared with others by its factors", may_have_bias=True,
        remedy="leave it out: lorary library remove, or cluster a copy of the library without it",
    )  # fmt: skip


def check_shape(names: tuple[str, str], path: str, expected: tuple[int, int], actual: tuple[int, int]) -> None:
    """Refuse an adapter whose layer has another shape than in the adapters before.

    Args:
        names: of the first adapter that has the layer, and of this one.
        path: of the layer.
        expected: (d_in, d_out) in the first adapter.
        actual: (d_in, d_out) in this one.

    Raises:
        AdapterError: if they differ.
    """
    if actual != expected:
        raise AdapterError(
            f"adapters '{names[0]}' and '{names[1]}' must have the same (d_in, d_out) at layer '{path}' to be compared",
            found=f"{expected} and {actual}",
            remedy="compare adapters of one base model only",
        )
