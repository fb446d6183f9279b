"""What all benchmarks share: made adapters, the machine's description, and rows of one form."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft import tensors_of
from lorary.formats.peft_config import new_config
from lorary.keys import keyed_generator


def made_adapter(name: str, targets: dict[str, tuple[int, int]], rank: int = 4) -> Adapter:
    """A random adapter over the given layers; what it answers is noise, what it costs is real."""
    modules = {}
    for path, (d_in, d_out) in targets.items():
        generator = keyed_generator("benchmark", name, path)
        lora_a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        lora_b = torch.randn(d_out, rank, generator=generator) * 0.01
        modules[path] = LoraFactors(lora_a, lora_b, 4.0)
    leaves = sorted({path.rsplit(".", 1)[-1] for path in targets})
    config = new_config("embedded", rank=rank, alpha=4.0 * rank, target_modules=leaves)
    return Adapter(name, modules, config, tensors_of(modules))


def row(
    case: str,
    figure: str,
    unit: str,
    better: str,
    *,
    ours: float | None,
    base: float | None = None,
    peer: float | None = None,
    floor: float | None = None,
) -> dict[str, Any]:
    """One row of a benchmark's table; ratios are ours / other, None where they have no meaning."""

    def ratio(other: float | None) -> float | None:
        return None if ours is None or not other else ours / other

    return {
        "case": case,
        "figure": figure,
        "unit": unit,
        "ours": ours,
        "base": base,
        "peer": peer,
        "floor": floor,
        "ratio_to_base": ratio(base),
        "ratio_to_peer": ratio(peer),
        "better": better,
    }


def machine() -> dict[str, Any]:
    """The machine in words that others can compare."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    has_cuda = torch.cuda.is_available()
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": has_cuda,
        "accelerator": torch.cuda.get_device_name() if has_cuda else kind and kind.type,
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    return {package: version(package) for package in ("lorary", "torch", "transformers", "peft")}


def report(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the table, or the JSON document."""
    if as_json:
        print(json.dumps({"rows": rows, "machine": machine(), "versions": versions()}))
        return
    print(
        f"{'case':<28} {'figure':<34} {'ours':>10} {'base':>10} {'PEFT':>10} {'floor':>10} {'x base':>8} {'x PEFT':>8}"
        "  unit"
    )
    for entry in rows:
        numbers = [entry[key] for key in ("ours", "base", "peer", "floor", "ratio_to_base", "ratio_to_peer")]
        shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
        widths = (10, 10, 10, 10, 8, 8)
        cells = " ".join(f"{text:>{width}}" for text, width in zip(shown, widths, strict=True))
        print(f"{entry['case']:<28} {entry['figure']:<34} {cells}  {entry['unit']}  {entry.get('note', '')}".rstrip())
