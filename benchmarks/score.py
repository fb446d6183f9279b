"""Scoring the options of questions: prompts computed once, beside every row by itself.

    python benchmarks/score.py [--threads N] [--turns 3] [--cases short,long] [--json]

Rows are made of random tokens, since only their lengths matter: questions of four options each, over the embedded base,
bare and routed by Arrow (top 4 of 8 made experts of rank 4 in all linear layers). `base` is the same code with rows
kept apart, as padded batches of similar length. The two take turns; figures are medians over the turns, `spread` holds
the least and the largest ratio of a turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

import lorary
from lorary.data.template import Example
from lorary.evaluate import loglik
from lorary.keys import keyed_generator
from lorary.lora.targets import ALL_LINEAR, find_targets
from lorary.model.base import load_base

OPTIONS = 4
EXPERTS = 8


@dataclass(frozen=True)
class Case:
    """Questions of one kind.

    Args:
        name: of its rows.
        questions: how many.
        instruction: tokens that all of them begin with.
        question: further tokens of each prompt.
        option: tokens of an option, EOS included.
    """

    name: str
    questions: int
    instruction: int
    question: int
    option: int


CASES = (
    Case("short", questions=12, instruction=0, question=16, option=4),
    Case("instructed", questions=6, instruction=40, question=24, option=4),
    Case("long options", questions=4, instruction=0, question=40, option=30),
    Case("long", questions=2, instruction=0, question=240, option=6),
    Case("few-shot", questions=1, instruction=600, question=60, option=6),
)


def made_rows(case: Case) -> list[Example]:
    """Random tokens in the lengths of a case."""
    generator = keyed_generator("score", case.name)

    def ids(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(1000, 40_000, (number,), generator=generator).tolist())

    instruction, rows = ids(case.instruction), []
    for _ in range(case.questions):
        prompt = instruction + ids(case.question)
        rows += [Example(prompt, ids(case.option), 0) for _ in range(OPTIONS)]
    return rows


@contextmanager
def rows_apart() -> Iterator[None]:
    """Score as if the model allowed no sharing."""
    found = loglik._packed_length
    loglik._packed_length = lambda _model, _longest: 0
    try:
        yield
    finally:
        loglik._packed_length = found


def measure(model: Any, case: Case, label: str, turns: int) -> list[dict[str, Any]]:
    """Speed both ways, and how far the losses are apart."""
    rows, ours, base, apart = made_rows(case), [], [], 0.0
    loglik.answer_losses(model, rows[:1])  # warms up
    for _ in range(turns):
        started = time.perf_counter()
        shared = loglik.answer_losses(model, rows)
        middle = time.perf_counter()
        with rows_apart():
            alone = loglik.answer_losses(model, rows)
        ended = time.perf_counter()
        ours.append(len(rows) / (middle - started))
        base.append(len(rows) / (ended - middle))
        apart = max(apart, *(abs(a.total - b.total) / b.total for a, b in zip(shared, alone, strict=True)))
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    name = f"{case.name}, {label}"
    speed = harness.row(
        name, "rows", "rows/s", "higher", ours=statistics.median(ours), base=statistics.median(base)
    ) | {"spread": [min(ratios), max(ratios)], "note": f"{min(ratios):.2f} to {max(ratios):.2f}"}  # fmt: skip
    return [speed, harness.row(name, "losses, furthest apart", "relative", "lower", ours=apart)]


def routed(model: Any, folder: str) -> Any:
    """The model with made experts seated, routed by Arrow."""
    targets = find_targets(model, [ALL_LINEAR])
    library = lorary.Library.create(Path(folder) / "library", model, base_name="embedded")
    for number in range(EXPERTS):
        library.add_adapter(harness.made_adapter(f"expert{number}", targets), {"tasks": [f"task{number}"]})
    return lorary.attach(model, library, router="arrow", top_k=4)


def main() -> None:
    """Every case bare, then routed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [case for case in CASES if case.name in options.cases.split(",")]
    model, rows = load_base("embedded").model, []
    for case in cases:
        rows += measure(model, case, "bare", options.turns)
    with tempfile.TemporaryDirectory() as folder:
        routed(model, folder)
        for case in cases:
            rows += measure(model, case, "routed", options.turns)
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
