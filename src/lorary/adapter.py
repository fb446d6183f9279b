"""An adapter: the LoRA weights of one expert, as plain immutable data."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lorary.errors import AdapterError, ShapeError
from lorary.tabular import ResultTable, Tabular

# Fields of PEFT's adapter_config.json that change the function an adapter computes. The content hash covers these
# and no others, since PEFT writes about forty more that vary with its version.
FUNCTIONAL_FIELDS = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora")


@dataclass(frozen=True, repr=False)
class LoraFactors:
    """The two factors of one adapted linear layer: `delta = scaling * lora_b @ lora_a`.

    Args:
        lora_a: (rank, d_in), any float dtype.
        lora_b: (d_out, rank), the dtype of `lora_a`.
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    Raises:
        ShapeError: if the factors are not two matrices that share the rank axis.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        a, b = tuple(self.lora_a.shape), tuple(self.lora_b.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ShapeError("lora_a must be (rank, d_in) and lora_b (d_out, rank)", found=f"lora_a {a}, lora_b {b}")

    def __repr__(self) -> str:
        return f"LoraFactors(rank={self.rank}, d_in={self.d_in}, d_out={self.d_out}, scaling={self.scaling:g})"

    @property
    def rank(self) -> int:
        """Size of the low-rank axis."""
        return int(self.lora_a.shape[0])

    @property
    def d_in(self) -> int:
        """Input features of the layer."""
        return int(self.lora_a.shape[1])

    @property
    def d_out(self) -> int:
        """Output features of the layer."""
        return int(self.lora_b.shape[0])

    def delta(self) -> Tensor:
        """The full update, (d_out, d_in). For small layers and tests: no rule needs it."""
        return self.scaling * (self.lora_b @ self.lora_a)


@dataclass(frozen=True, repr=False)
class Adapter(Tabular):
    """LoRA weights for some linear layers of one base model.

    Args:
        name: label of the adapter inside a library.
        modules: factors by the dotted path of the linear layer they adapt (`model.layers.0.self_attn.q_proj`).
        config: PEFT's adapter_config.json, value for value.
        tensors: the tensors by the keys they have on disk; empty for an adapter that never was on disk.
    """

    name: str
    modules: Mapping[str, LoraFactors]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterError(f"adapter '{self.name}' must adapt at least one linear layer", found="no LoRA factors")
        for attribute in ("modules", "config", "tensors"):
            ordered = dict(sorted(getattr(self, attribute).items()))
            object.__setattr__(self, attribute, MappingProxyType(ordered))

    def __repr__(self) -> str:
        return (
            f"Adapter({self.name!r}, rank={self.rank}, layers={len(self.modules)}, "
            f"num_parameters={self.num_parameters})"
        )

    def tables(self) -> list[ResultTable]:
        """The adapted layers."""
        records = self.records()
        return [ResultTable(repr(self), list(records[0]), [list(record.values()) for record in records])]

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each adapted layer: its path, rank, sizes and scaling."""
        return [
            {"layer": path, "rank": f.rank, "d_in": f.d_in, "d_out": f.d_out, "scaling": f.scaling} for path, f in self
        ]

    def __iter__(self) -> Iterator[tuple[str, LoraFactors]]:
        return iter(self.modules.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        # Nothing of it ever changes, so that a copy of a model that keeps one needs no second one.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only views of mappings cannot be pickled themselves.
        return Adapter, (self.name, dict(self.modules), dict(self.config), dict(self.tensors))

    @property
    def rank(self) -> int:
        """The largest rank over the adapted layers."""
        return max(factors.rank for factors in self.modules.values())

    @property
    def num_parameters(self) -> int:
        """Numbers in all factors."""
        return sum(f.lora_a.numel() + f.lora_b.numel() for f in self.modules.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for f in self.modules.values() for t in (f.lora_a, f.lora_b))


def content_hash(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of what an adapter computes: functional configuration, tensor names, dtypes, shapes and bytes.

    Args:
        config: PEFT's adapter_config.json.
        tensors: the tensors by their keys on disk, any dtype, on the CPU.

    Returns:
        64 hexadecimal digits, the same for any order of fields (but not of patterns) and any other field.
    """
    digest = hashlib.sha256()
    functional = {key: config[key] for key in FUNCTIONAL_FIELDS if config.get(key) not in (None, {}, False)}
    for key in functional.keys() & {"rank_pattern", "alpha_pattern"}:
        functional[key] = list(functional[key].items())  # the first pattern that matches a layer wins: order counts
    digest.update(json.dumps(functional, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
