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
FUNCTIONAL_FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora",
    "lora_bias",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class LoraFactors:
    """The two factors of one adapted linear layer: `delta = scaling * lora_b @ lora_a`.

    Two further parts make it more than a low-rank update, and few adapters have one. With a bias the layer's output
    gains `scaling * bias` (PEFT's `lora_bias`). With a magnitude the layer multiplies by
    `magnitude / |W + delta| * (W + delta)`, the norm being that of each row (DoRA, 2402.09353), W the base's weight.

    Args:
        lora_a: (rank, d_in), any float dtype.
        lora_b: (d_out, rank), the dtype of `lora_a`.
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        bias: (d_out,), any float dtype; None for an adapter without.
        magnitude: (d_out,), any float dtype; None for an adapter that is no DoRA.

    Raises:
        ShapeError: if the factors are not two matrices that share the rank axis, or a further part has another length.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        a, b = tuple(self.lora_a.shape), tuple(self.lora_b.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ShapeError("lora_a must be (rank, d_in) and lora_b (d_out, rank)", found=f"lora_a {a}, lora_b {b}")
        for name, part in (("bias", self.bias), ("magnitude", self.magnitude)):
            if part is not None and part.shape != b[:1]:
                raise ShapeError(f"the {name} of lora_b {b} must be (d_out,)", found=tuple(part.shape))

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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that was trained."""
        return tuple(t for t in (self.lora_a, self.lora_b, self.bias, self.magnitude) if t is not None)

    @property
    def further(self) -> str | None:
        """What makes the update more than low-rank, in words; None for a plain LoRA."""
        if self.magnitude is not None:
            return "DoRA: its magnitudes rescale the base's own output"
        return None if self.bias is None else "lora_bias: a bias acts beside lora_B"

    @property
    def acts(self) -> bool:
        """Whether it does anything, as far as a layer without its base's weight shows: a DoRA always counts."""
        is_low_rank_zero = not (self.lora_a.any() and self.lora_b.any())
        has_bias = self.bias is not None and bool(self.bias.any())
        return not is_low_rank_zero or has_bias or self.magnitude is not None

    def delta(self) -> Tensor:
        """The low-rank update, (d_out, d_in). For small layers and tests: no rule needs it."""
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
        """Numbers that were trained."""
        return sum(t.numel() for f in self.modules.values() for t in f.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of what was trained."""
        return sum(t.numel() * t.element_size() for f in self.modules.values() for t in f.tensors)


def check_low_rank(
    name: str, modules: Mapping[str, LoraFactors], purpose: str, *, remedy: str, may_have_bias: bool = False
) -> None:
    """Refuse an adapter whose update is more than low-rank for what would leave the further parts out.

    Args:
        name: of the adapter.
        modules: its factors by path of the layer.
        purpose: what needs a plain LoRA, as it follows "to".
        remedy: what to do instead.
        may_have_bias: whether a bias beside lora_b is allowed, since it depends on no token.

    Raises:
        AdapterError: naming the adapter, its first such layer and the part.
    """
    for path, factors in modules.items():
        if factors.further is not None and not (may_have_bias and factors.magnitude is None):
            raise AdapterError(
                f"adapter '{name}' must be a plain LoRA to {purpose}",
                found=f"{path} is of a {factors.further}",
                remedy=remedy,
            )


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
