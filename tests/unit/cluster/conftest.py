"""Made adapters in groups, small enough to be clustered in milliseconds."""

from collections.abc import Callable

import pytest
import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.keys import keyed_generator

SHAPES = {"layers.0.q_proj": (40, 40), "layers.0.up_proj": (40, 64), "layers.1.down_proj": (64, 40)}


def made_adapter(
    name: str, group: int, *, own: float = 0.5, draw: str = "shared", rank: int = 3, dtype: torch.dtype = torch.float64
) -> Adapter:
    """An adapter of a group: one direction per group, and noise of its own."""

    def numbers(kind: str, key: object, path: str, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=keyed_generator(kind, key, path), dtype=torch.float64)

    modules = {}
    for path, (d_in, d_out) in SHAPES.items():
        lora_a = numbers("draw", draw, path, rank, d_in)
        lora_b = numbers("group", group, path, d_out, rank) + own * numbers("own", name, path, d_out, rank)
        modules[path] = LoraFactors(lora_a.to(dtype), lora_b.to(dtype), 2.0)
    return Adapter(name, modules, {})


@pytest.fixture
def made() -> Callable[..., Adapter]:
    """A factory of adapters in groups: `made("a", 0, own=0.5, draw="shared", rank=3, dtype=torch.float64)`."""
    return made_adapter


@pytest.fixture
def groups() -> dict[str, Adapter]:
    """Nineteen adapters in four groups of 7, 6, 4 and 2: `g0-0` to `g3-1`."""
    names = [f"g{group}-{index}" for group, size in enumerate((7, 6, 4, 2)) for index in range(size)]
    return {name: made_adapter(name, int(name[1])) for name in names}
