"""Adapters as folders of PEFT's two files, and with a bias or a magnitude (DoRA) beside their factors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft import encode_adapter
from lorary.formats.peft_patterns import new_adapter


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files of an adapter into a folder, made where it does not exist."""
    files = encode_adapter(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def as_dora(adapter: Adapter, model: Any, generator: torch.Generator) -> Adapter:
    """The adapter with magnitudes beside its factors, off the norms of W + delta by a third of these on average.

    Args:
        adapter: a plain LoRA.
        model: the base that it fits.
        generator: of the magnitudes.
    """
    modules = {}
    for path, factors in adapter:
        norms = (matrix_of(model, path) + factors.delta().double()).norm(dim=1)
        drawn = norms * (1 + 0.3 * torch.randn(factors.d_out, generator=generator).double())
        modules[path] = replace(factors, magnitude=drawn.to(factors.lora_b))
    return new_adapter(adapter.name, modules, None)


def with_biases(adapter: Adapter, generator: torch.Generator) -> Adapter:
    """The adapter with a bias beside each lora_b."""
    modules = {
        path: replace(factors, bias=0.3 * torch.randn(factors.d_out, generator=generator).to(factors.lora_b))
        for path, factors in adapter
    }
    return new_adapter(adapter.name, modules, None)


def matrix_of(model: Any, path: str) -> torch.Tensor:
    """The matrix of a layer of the base, (d_out, d_in) in float64, whatever its kind."""
    layer = model.get_submodule(path)
    weight: torch.Tensor = layer.weight.detach().double()
    return weight.mT if hasattr(layer, "nx") else weight


def whole_update(model: Any, path: str, factors: LoraFactors) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert adds to a layer, as a matrix (d_out, d_in) and a vector (d_out,), by the definition alone."""
    matrix = matrix_of(model, path)
    changed = matrix + factors.scaling * factors.lora_b.double() @ factors.lora_a.double()
    if factors.magnitude is not None:
        changed = factors.magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
    offset = torch.zeros(factors.d_out, dtype=torch.float64)
    if factors.bias is not None:
        offset = factors.scaling * factors.bias.double()
    return changed - matrix, offset
