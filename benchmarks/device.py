"""Routing on whatever accelerator is there: bare base, one adapter, Arrow, contrast, uniform and PEFT's Arrow.

    python benchmarks/device.py [--shapes llama|mistral] [--layers 8] [--experts 10,64,256] [--seconds 500]
                                [--device auto] [--report FILE.md] [--json]

A base of the shapes of Llama-3-8B or Mistral-7B with random weights in bfloat16, of fewer layers; made adapters of rank
4 on all its linear layers, top 4. Contenders over the same weights take turns in one process, round by round. Figures
are medians over rounds, and ratios are to the base of the same rounds.

* `prefill-N`: one pass over N tokens, logits of the last one. `decode-B`: one step of B rows behind a cache of 128.
* `decode-B graphs`: the same as a CUDA graph over a static cache, for the base and Arrow; on CUDA only.
* `arrow fused` is Arrow by the two Triton kernels of `LORARY_FUSED=1`, where Triton can run.
* `contrast` decides once for a prompt, in a pass of the bare base more; its moments are made up.
* `memory`: the peak of a pass over 512 tokens above what was allocated before; on CUDA only. `experts`: what is stored
  for them, by their tensors.
* `attach`: from adapters on disk to a model that is ready.

The run ends before `--seconds` (540 at most). What it did not come to is named. It measures no training: that has
`train.py`. On a machine without an accelerator it runs on the CPU, which says nothing of one; `--shapes tiny` is for
tests.
"""

import argparse
import datetime
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import harness
import torch
from route_models import MOST_PEER_EXPERTS, MOST_PEER_TOKENS, TOP_K, Shelf
from route_turns import DECODE_STEPS, Case, take_turns
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache

import lorary
from lorary.lora.fused import VARIABLE
from lorary.model.prepare import prepare
from lorary.model.seating import seating

MOST_SECONDS = 540.0
GRAPH_WARM_UP = 3
PROMPT = 128
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES: Mapping[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14336, **HEADS},
    ),
    "mistral": (
        MistralConfig,
        MistralForCausalLM,
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14336, "sliding_window": None, **HEADS},
    ),
    "tiny": (
        LlamaConfig,
        LlamaForCausalLM,
        {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    ),
}
CASES = (
    Case("prefill-512", 512),
    Case("prefill-4096", 4096),
    *(Case(f"decode-{batch}", 1, batch=batch, cached=PROMPT) for batch in (1, 8, 64)),
)
Rows = list[dict[str, Any]]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Side:
    """One contender.

    Args:
        name: of its figures.
        experts: seated in it; 1 for a single adapter, 0 for the base.
        model: the bare base, a routed model, or PEFT's.
        setting: of routing, while it has its turn; as attached where None.
        is_peer: whether PEFT runs it.
        is_fused: whether the fused plan runs it.
    """

    name: str
    experts: int
    model: Any
    setting: Any = None
    is_peer: bool = False
    is_fused: bool = False

    @property
    def title(self) -> str:
        """Its name, and whose it is."""
        return f"PEFT's {self.name}" if self.is_peer else self.name

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is in force while it runs."""
        with (
            patch.dict(os.environ, {VARIABLE: str(int(self.is_fused))}),
            nullcontext() if self.setting is None else lorary.routing(self.model, self.setting),
        ):
            yield


@dataclass
class Clock:
    """Seconds that are left, and what there was no time for."""

    seconds: float
    start: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    def has(self, seconds: float, what: str) -> bool:
        """Whether there is time for something; if not, it is named."""
        passed = time.monotonic() - self.start
        if passed + seconds <= self.seconds:
            print(f"{passed:5.0f} s  {what} ...", file=sys.stderr)
            return True
        self.left_out.append(f"{what}: no time was left")
        return False

    def attempt(self, seconds: float, what: str, measure: Callable[[], Result], default: Result) -> Result:
        """What is measured, or the default where there is no time for it or it fails, which is named.

        Whatever fails: a machine with a device may not be had again, and the other figures count.
        """
        if not self.has(seconds, what):
            return default
        try:
            return measure()
        except Exception as error:
            is_full = isinstance(error, torch.OutOfMemoryError)
            first_line = next(iter(str(error).splitlines()), "")
            self.left_out.append(f"{what}: {'out of memory' if is_full else f'{type(error).__name__}: {first_line}'}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return default


def load_model(shapes: str, layers: int, device: torch.device) -> Any:
    """A base with random weights on a device, in bfloat16."""
    config, kind, sizes = SHAPES[shapes]
    torch.manual_seed(0)
    settings = {**sizes, "num_hidden_layers": layers, "max_position_embeddings": 8192}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return kind(config(**settings)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels of the fused plan can run on a device."""
    if find_spec("triton") is None:
        return False
    return device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.no_grad()
def seconds_of(side: Side, case: Case) -> float:
    """Seconds of one pass: of the prompt, or the median of some steps behind a cache."""
    model, device = side.model, side.model.device
    generator = torch.Generator().manual_seed(0)
    length = case.cached or case.tokens
    prompt = torch.randint(3, model.config.vocab_size, (case.batch, length), generator=generator).to(device)
    with side.turn():
        wait(device)
        start = time.perf_counter()
        output = model(input_ids=prompt, use_cache=bool(case.cached), logits_to_keep=1)
        wait(device)
        if not case.cached:
            return time.perf_counter() - start
        cache, times, token = output.past_key_values, [], prompt[:, -1:]
        for _ in range(DECODE_STEPS):
            start = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            wait(device)
            times.append(time.perf_counter() - start)
        return median(times[1:])


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A step as a CUDA graph, which replays what it did; on another device the step itself.

    A step during which the host waits cannot be captured: CUDA raises an error.
    """
    if device.type != "cuda":
        return step
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(GRAPH_WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def graph_seconds(side: Side, case: Case) -> Callable[[], float]:
    """A function that gives the seconds of one step over a static cache, captured as a graph.

    The cache has room for one turn, since attention reads all of it; each turn begins behind the prompt again.
    """
    model, device = side.model, side.model.device
    prompt = torch.ones(case.batch, case.cached, dtype=torch.long, device=device)
    token = prompt[:, :1].clone()
    cache = StaticCache(model.config, max_cache_len=case.cached + max(DECODE_STEPS, GRAPH_WARM_UP + 1))
    with side.turn():
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = captured(lambda: model(input_ids=token, past_key_values=cache, use_cache=True), device)

    @torch.no_grad()
    def run() -> float:
        for layer in cache.layers:
            layer.cumulative_length.fill_(case.cached)
        times = []
        with side.turn():
            for _ in range(DECODE_STEPS):
                wait(device)
                start = time.perf_counter()
                step()
                wait(device)
                times.append(time.perf_counter() - start)
        return median(times[1:])

    return run


def case_rows(label: str, base: Side, sides: Sequence[Side], found: Mapping[Side, Sequence[float]]) -> Rows:
    """One row for each of ours, the base and PEFT's beside it."""
    bare, peers = 1e3 * median(found[base]), {(s.name, s.experts): s for s in sides if s.is_peer}
    rows = Rows()
    for side in sides:
        if side.is_peer or side is base:
            continue
        peer = peers.get((side.name, side.experts))
        entry = harness.row(
            f"{label} E={side.experts}", side.name, "ms", "lower", ours=1e3 * median(found[side]), base=bare,
            peer=None if peer is None else 1e3 * median(found[peer]),
        )  # fmt: skip
        ratios = [mine / theirs for mine, theirs in zip(found[side], found[base], strict=True)]
        rows.append({**entry, "spread": [min(ratios), max(ratios)], "rounds": len(ratios)})
    return rows


def seat(shelf: Shelf, experts: int, clock: Clock, *, is_first: bool) -> tuple[list[Side], Rows]:
    """Attach so many adapters, ours and PEFT's; at the smallest size there is a single adapter, too."""
    shelf.grow(experts)
    routed, ours_s = shelf.attach(repeats=1)
    moments = {
        name: {path: torch.tensor([0.1, 1.0]) for path in seating(routed).layers} for name in seating(routed).experts
    }
    prepare(routed, "contrast", moments)
    # Arrow as it was attached, for a compiled model: another block would be another compilation.
    sides = [Side("arrow", experts, routed), *(Side(name, experts, routed, name) for name in ("contrast", "uniform"))]
    if can_fuse(routed.device):
        sides.append(Side("arrow fused", experts, routed, {"router": "arrow", "top_k": TOP_K}, is_fused=True))
    if is_first:
        sides.append(Side("one expert", 1, routed, {"experts": [shelf.library.names()[0]]}))
    stored = sum(b.nbytes for layer in seating(routed).layers.values() for b in layer.lora.buffers())
    case = f"{shelf.name} attach E={experts}"
    entry = harness.row(case, "time to attach", "s", "lower", ours=ours_s)
    rows = [entry, harness.row(case, "experts", "GB", "lower", ours=stored / 1e9)]
    if experts <= MOST_PEER_EXPERTS:
        what = f"PEFT's Arrow over {experts} experts"
        theirs, peer_s, loaded = clock.attempt(60.0, what, lambda: shelf.attach_peer(60.0), (None, 0.0, None))
        if theirs is not None:
            sides.append(Side("arrow", experts, theirs, is_peer=True))
            rows[0] = harness.row(case, "time to attach", "s", "lower", ours=ours_s, peer=peer_s)
        elif loaded is not None:
            clock.left_out.append(f"{what}: {loaded} were loaded in {peer_s:.0f} s")
    return sides, rows


def measure_case(shapes: str, base: Side, sides: Sequence[Side], case: Case, clock: Clock) -> Rows:
    """Turns of all who can do a case at all; the first pass of each is no figure."""
    able = [base]
    for side in sides:
        if not (side.is_peer and case.tokens > MOST_PEER_TOKENS):
            what = f"{case.name}, {side.title} over {side.experts}"
            if clock.attempt(0.0, what, partial(seconds_of, side, case), None) is not None:
                able.append(side)
    seconds_of(base, case)
    turns = {side: (lambda side=side: seconds_of(side, case)) for side in able}
    return case_rows(f"{shapes} {case.name}", base, able, take_turns(turns, 0.0 if shapes == "tiny" else 6.0))


@torch.no_grad()
def memory_rows(name: str, sides: Sequence[Side]) -> Rows:
    """The peak of a pass over 512 tokens above what was allocated before; the base is the first of the sides."""
    rows, base = Rows(), None
    for side in sides:
        device = side.model.device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        seconds_of(side, Case("memory", 512))
        peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        base = peak if base is None else base
        rows.append(harness.row(f"{name} memory E={side.experts}", side.title, "MB", "lower", ours=peak, base=base))
    return rows


def run_all(shapes: str, model: Any, sizes: Sequence[int], cases: Sequence[Case], clock: Clock) -> Rows:
    """All rows.

    Args:
        shapes: name of the base.
        model: the base.
        sizes: numbers of experts, ascending.
        cases: to run.
        clock: tells when to stop.
    """
    rows, base, arrows = Rows(), Side("base", 0, model), list[Side]()
    is_cuda = model.device.type == "cuda"
    if not is_cuda:
        clock.left_out.append(f"memory and CUDA graphs: the device is {model.device.type}")
    if not can_fuse(model.device):
        clock.left_out.append("the fused plan: Triton is not installed, or cannot run on this device")
    with tempfile.TemporaryDirectory(prefix="lorary-benchmark-") as folder:
        shelf = Shelf(shapes, model, Path(folder))
        for experts in sizes:
            seconds, is_first, over = 0.0 if shapes == "tiny" else experts * 0.5, not arrows, f"over {experts} experts"
            seat_all = partial(seat, shelf, experts, clock, is_first=is_first)
            sides, seated = clock.attempt(seconds, f"{experts} experts", seat_all, ([], Rows()))
            rows += seated
            for case in cases if sides else ():
                what = f"{case.name} {over}"
                rows += clock.attempt(30.0, what, partial(measure_case, shapes, base, sides, case, clock), [])
            if is_cuda and sides:
                rows += clock.attempt(10.0, f"memory {over}", partial(memory_rows, shapes, [base, *sides]), [])
            arrows += sides[:1]
            del sides
        # Last: CUDA may do nothing more after a capture that failed.
        for case in [case for case in cases if is_cuda and case.cached]:
            for arrow in arrows:
                what = f"{case.name} graphs over {arrow.experts} experts"
                rows += clock.attempt(20.0, what, partial(graph_rows, shapes, base, arrow, case), [])
    return rows


def graph_rows(shapes: str, base: Side, arrow: Side, case: Case) -> Rows:
    """Base and Arrow, each as one graph over a static cache."""
    turns = {side: graph_seconds(side, case) for side in (base, arrow)}
    return case_rows(f"{shapes} {case.name} graphs", base, [base, arrow], take_turns(turns, 3.0))


def save_report(rows: Rows, clock: Clock, path: Path, command: str, device: torch.device) -> None:
    """Write a dated page: machine, command, table, and what was left out."""
    machine, versions = harness.machine(), harness.versions()
    place = machine["accelerator"] if device.type != "cpu" else "no accelerator: these are figures of the CPU"
    lines = [
        f"# Routing on a device, {datetime.date.today().isoformat()}",
        "",
        f"Device: {place}. Host: {machine['cpu']}, {machine['cores']} cores. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". What is measured, and how: the head of `benchmarks/device.py`.",
        "",
        "```bash",
        command,
        "```",
        "",
        "| case | contender | ours | base | PEFT | unit | x base (least to largest of a round) | x PEFT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours, base, peer, to_base, to_peer = (
            "" if row[key] is None else f"{row[key]:.3g}"
            for key in ("ours", "base", "peer", "ratio_to_base", "ratio_to_peer")
        )
        spread = " ({:.2f} to {:.2f})".format(*row["spread"]) if "spread" in row else ""
        cells = (row["case"], row["figure"], ours, base, peer, row["unit"], to_base + spread, to_peer)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Left out:", "", *(f"- {reason}" for reason in clock.left_out or ["nothing"])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=[*SHAPES], default="llama")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", default="10,64,256")
    parser.add_argument("--only", default="", help=f"some of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--seconds", type=float, default=500.0, help=f"until it stops, {MOST_SECONDS:g} at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--report", type=Path, help="a Markdown file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    wanted = {*options.only.split(",")} - {""}
    if unknown := wanted - {case.name for case in CASES}:
        parser.error(f"--only must be some of {', '.join(case.name for case in CASES)}; found: {', '.join(unknown)}")
    if not 0 < options.seconds <= MOST_SECONDS:
        parser.error(f"--seconds must be above 0 and at most {MOST_SECONDS:g}; found: {options.seconds:g}")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(options.device) if options.device != "auto" else found or torch.device("cpu")
    clock = Clock(options.seconds)
    sizes = sorted({max(int(size), TOP_K) for size in options.experts.split(",")})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(options.shapes, options.layers, device)
        rows = run_all(options.shapes, model, sizes, [c for c in CASES if not wanted or c.name in wanted], clock)
    if options.report:
        # Where the report lies on this machine is nobody's business.
        given = sys.argv[1:] if arguments is None else arguments
        words = [word.replace(str(options.report), options.report.name) for word in given]
        save_report(rows, clock, options.report, " ".join(["python benchmarks/device.py", *words]), device)
    harness.report(rows, options.json)
    for reason in clock.left_out:
        print(f"left out: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
