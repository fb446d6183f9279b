"""Memory of a routed forward pass over many experts, beside the bare base and PEFT's Arrow.

    python benchmarks/memory.py [--experts 64] [--tokens 256] [--json]

Each contender runs in a process of its own. `temporary` is the peak of the resident set during the second forward pass
minus the resident set before it; `growth` is what attaching the experts added, beside the bytes of the adapters.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorary
from lorary.formats.base import resolve_base
from lorary.lora.targets import ALL_LINEAR, find_targets
from lorary.model.base import load_base

MIB = 2**20


def status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def settle() -> int:
    """Give freed memory back to the system; the resident set, in bytes."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def temporary_of_forward(model: Any, tokens: int) -> int:
    """Peak minus resident of one forward pass, after a first one that warmed up."""
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        before = settle()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        model(input_ids=ids, use_cache=False)
    return status("VmHWM") - before


def warm_up(contender: str) -> None:
    """Attach one small adapter to a small model: code that is loaded once, whatever is attached, is no growth."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as name:
        library = lorary.Library.create(Path(name) / "library", base=model, base_name="small")
        library.add_adapter(harness.made_adapter("small", find_targets(model, [ALL_LINEAR])), {"tasks": []})
        attach(contender, model, library)


def attach(contender: str, model: Any, library: lorary.Library) -> Any:
    """The model of a contender, over all adapters of a library."""
    if contender == "ours":
        return lorary.attach(model, library, router="arrow")
    if contender == "peer":
        from peft import ArrowConfig
        from peft.tuners.lora.arrow import create_arrow_model

        paths = [str(library.path / "adapters" / name) for name in library]
        config = ArrowConfig(top_k=min(4, len(paths)), router_temperature=1.0, rng_seed=0)
        return create_arrow_model(model, task_specific_adapter_paths=paths, arrow_config=config)
    return model


def run_contender(contender: str, model: Any, folder: Path, tokens: int) -> dict[str, float]:
    """Measure one contender in this process, over a base whose weights are resident."""
    warm_up(contender)
    before = settle()
    model = attach(contender, model, lorary.Library.open(folder / "library"))
    return {"growth": settle() - before, "temporary": temporary_of_forward(model, tokens)}


def in_process(contender: str, command: Sequence[str]) -> dict[str, float]:
    """Measure one contender in a process of its own, which prints what it found as its last line."""
    print(f"measuring {contender} ...", file=sys.stderr)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory_rows(case: str, measured: Mapping[str, Mapping[str, float]], adapters: int) -> list[dict[str, Any]]:
    """Both figures of the contenders that were measured; `adapters` is the size of their files, in bytes."""
    temporary = {name: entry["temporary"] / MIB for name, entry in measured.items()}
    growth = {name: measured[name]["growth"] / MIB for name in ("ours", "peer") if name in measured}
    return [
        harness.row(case, "temporary memory of a forward", "MiB", "lower", **temporary),
        harness.row(case, "resident growth (base: adapters)", "MiB", "lower", base=adapters / MIB, **growth),
    ]


def main() -> None:
    """Make the library, measure each contender in its own process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.contender:
        model = load_base("embedded").model
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # out of the mapped file: resident from the start
        print(json.dumps(run_contender(options.contender, model, options.folder, options.tokens)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.device("meta"):
            from transformers import AutoConfig

            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_base("embedded").path))
        targets = find_targets(skeleton, [ALL_LINEAR])
        library = lorary.Library.create(folder / "library", base="embedded")
        for index in range(options.experts):
            library.add_adapter(harness.made_adapter(f"expert-{index:03d}", targets), {"tasks": []})
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        command = [__file__, "--folder", name, "--tokens", str(options.tokens)]
        measured = {one: in_process(one, [*command, "--contender", one]) for one in ("base", "ours", "peer")}
    rows = memory_rows(f"arrow-{options.experts}-{options.tokens}", measured, size)
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
