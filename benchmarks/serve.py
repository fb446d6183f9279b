"""What routed serving costs: many clients at once over one library, beside one at a time and beside the bare base.

    python benchmarks/serve.py LIB [--clients 16] [--prompt 64] [--answer 64] [--turns 3] [--clock wall|cpu] [--json]

Each client sends one request after the other, of prompts made from the builtin tasks. No answer ends before its length.
`decided` lets the library's default router decide for each request, and counts the decision. `named` names one expert
for all requests, `each named` another one for each, `arrow` decides for each token in each layer, and `mixed` has all
of these and the base in one batch. `generate` is `lorary generate` without its start: the same requests one at a time,
in the same process. All cases take turns; figures are medians over the turns. `--clock cpu` counts the processor time
of this process, for machines that others use too; it takes one thread.
"""

import argparse
import asyncio
import json
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import torch

from lorary.data.tasks import load_tasks
from lorary.evaluate import completion
from lorary.evaluate.completion import complete
from lorary.evaluate.decisions import decide
from lorary.library.opening import base_of
from lorary.library.store import Library
from lorary.model.attach import attach, routing
from lorary.model.base import Base, load_base
from lorary.model.seating import seating
from lorary.route.setting import Routing
from lorary.serve import decoder
from lorary.serve.batching import RoutedEngine
from lorary.serve.engine import Job
from lorary.serve.sizes import Sizes

CASES = ("base", "named", "each named", "decided", "arrow", "mixed")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One case, over the turns."""

    speed: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    routing: list[float] = field(default_factory=list)
    num_equal: int = 0
    num_compared: int = 0


def prompts_of(base: Base, number: int, length: int) -> list[tuple[int, ...]]:
    """Prompts of one length: rows of the builtin tasks, one behind the other, another order for each."""
    texts = [row.prompt for task in load_tasks("builtin").values() for row in task.split("val")[:8]]
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for _ in range(number):
        order = torch.randperm(len(texts), generator=generator).tolist()
        ids = base.tokenizer("\n".join(texts[i] for i in order))["input_ids"]
        while len(ids) < length:
            ids = ids + ids
        prompts.append(tuple(ids[:length]))
    return prompts


def settings_of(case: str, state: Any, default: Routing, number: int) -> list[Routing]:
    """The setting of each request of a case."""
    named = [Routing(experts=[state.experts[i % len(state.experts)]]) for i in range(number)]
    of_case = {
        "base": [Routing("base")],
        "named": named[:1],
        "each named": named,
        "decided": [default],
        "arrow": [Routing("arrow")],
        "mixed": [default, Routing("arrow"), named[0], Routing("base"), named[1 % len(named)]],
    }[case]
    return [of_case[i % len(of_case)] for i in range(number)]


async def serve(
    engine: RoutedEngine, prompts: Sequence[tuple[int, ...]], settings: Sequence[Routing], answer: int,
    clock: Callable[[], float], into: Measured,
) -> list[tuple[Routing, list[int]]]:  # fmt: skip
    """All clients at once: what answered each, and its answer."""

    async def client(prompt: tuple[int, ...], setting: Routing) -> tuple[Routing, list[int]]:
        began = clock()
        if setting.decides == "request":
            (decision,) = await engine.decide(setting, [prompt])
            setting = decision.setting(setting)
            into.routing.append(clock() - began)
        ids, last = [], 0.0
        async for token in engine.submit(Job(prompt, setting, answer)):
            (into.between if ids else into.first).append(clock() - (last if ids else began))
            last = clock()
            ids.append(token.id)
        return setting, ids

    began = clock()
    answers = await asyncio.gather(*map(client, prompts, settings))
    into.speed.append(len(prompts) * answer / (clock() - began))
    return answers


def generate(base: Base, prompt: tuple[int, ...], setting: Routing, answer: int) -> list[int]:
    """The same request by itself, as `lorary generate` answers it."""
    if setting.decides == "request":
        with routing(base.model, setting), torch.no_grad():
            (decision,) = decide(base.model, [prompt])
        setting = decision.setting(setting)
    with routing(base.model, setting):
        return complete(base, prompt, max_new_tokens=answer)


async def measure(base: Base, args: argparse.Namespace) -> dict[str, Measured]:
    """All cases in turn."""
    clock, state = CLOCKS[args.clock], seating(base.model)
    default = state.routing
    prompts = prompts_of(base, args.clients, args.prompt)
    cases = {case: Measured() for case in args.cases.split(",")}
    engine = RoutedEngine(base, Sizes(rows=args.clients, prefix_tokens=0))  # each prompt comes in each turn
    await engine.start()
    for turn in range(args.turns):
        for case, into in cases.items():
            settings = settings_of(case, state, default, args.clients)
            answers = await serve(engine, prompts, settings, args.answer, clock, into)
            began, chosen = clock(), [(turn * args.alone + i) % args.clients for i in range(args.alone)]
            for i in chosen:
                ids = await engine.call(
                    lambda _, i=i, settings=settings: generate(base, prompts[i], settings[i], args.answer)
                )
                into.num_equal += ids == answers[i][1]
                into.num_compared += 1
            if chosen:
                into.alone.append(len(chosen) * args.answer / (clock() - began))
    await engine.stop(drain=0)
    return cases


def quantile(values: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * float(torch.tensor(values, dtype=torch.float64).quantile(share))


def rows_of(cases: dict[str, Measured]) -> list[dict[str, Any]]:
    """The figures, in the form of all benchmarks."""
    rows = []
    for case, m in cases.items():
        base = statistics.median(cases["base"].speed) if "base" in cases else None
        alone = statistics.median(m.alone) if m.alone else None
        speed = statistics.median(m.speed)
        rows.append(harness.row(case, "throughput", "tokens/s", "higher", ours=speed, base=base, peer=alone))
        for name, values in (("first token", m.first), ("between tokens", m.between), ("routing", m.routing)):
            for share in (0.5, 0.95) if values else ():
                figure = f"{name}, p{share * 100:.0f}"
                rows.append(harness.row(case, figure, "ms", "lower", ours=quantile(values, share)))
        if m.num_compared:
            share = m.num_equal / m.num_compared
            rows.append(harness.row(case, "answers equal to generate's", "share", "higher", ours=share))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(harness.row("all", "most memory of the process", "MiB", "lower", ours=peak))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each case."""
    figures = ("first token, p50", "first token, p95", "between tokens, p50", "between tokens, p95", "routing, p50")
    heads = (
        "case",
        "tokens/s",
        "x generate",
        "x base",
        "first p50",
        "p95",
        "between p50",
        "p95",
        "routing ms",
        "equal",
    )
    lines = [" ".join(f"{head:>11}" for head in heads)]
    for case in dict.fromkeys(row["case"] for row in rows if row["case"] != "all"):
        own = {row["figure"]: row for row in rows if row["case"] == case}
        speed = own["throughput"]
        numbers = [speed["ours"], speed["ratio_to_peer"], speed["ratio_to_base"]]
        numbers += [own[figure]["ours"] if figure in own else None for figure in figures]
        numbers.append(own["answers equal to generate's"]["ours"] if "answers equal to generate's" in own else None)
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        lines.append(" ".join(f"{cell:>11}" for cell in (case, *cells)))
    return "\n".join([*lines, f"most memory of the process: {rows[-1]['ours']:.0f} MiB"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--alone", type=int, default=4, help="requests of each turn that are also made one at a time")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.clock == "cpu":
        torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    completion.stop_ids = decoder.stop_ids = lambda *_: [-1]  # an answer that ends early would be cheap
    library = Library.open(args.library)
    base = load_base(base_of(library, None))
    attach(base.model, library, tokenizer=base.tokenizer)
    rows = rows_of(asyncio.run(measure(base, args)))
    if args.json:
        print(json.dumps({"rows": rows, "machine": harness.machine(), "versions": harness.versions()}))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
