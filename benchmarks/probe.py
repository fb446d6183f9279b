"""What the trial of a base model costs: `load_base` and a small build, without it, the first time and the second time.

    python benchmarks/probe.py [--threads N] [--turns 7] [--cases load,build] [--json]

Each call runs in a process of its own. `call` is the time of the call alone; `process` begins before the imports, which
is what a user waits for. `base` is the same with the trial left out: the verdict of the first call is put in its
place. The three take turns; figures are medians over the turns, and `spread` holds the least and the largest ratio of
a turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import harness

CALLS = {
    "load": "load_base('embedded')",
    "build": "run_build('builtin', FOLDER + '/lib', preset('default', steps=4, upper_layers=6, val_rows=4), "
    "source=BuildSource(names=('sentiment', 'last_word')))",
}
CHILD = """
import time
began = time.perf_counter()
import json, sys, tempfile, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import lorary
from lorary.build.settings import BuildSource, preset
from lorary.model import kept, verdict
from lorary.model.base import load_base
from lorary.recipes.build import run_build
FOLDER, MODE = sys.argv[1:]
kept._place = lambda key: Path(VERDICTS) / f"{key}.json"
if MODE == "without":
    (file,) = Path(VERDICTS).glob("*.json")
    KEPT = kept.Verdict(**json.loads(file.read_text())["verdict"])
    verdict.verdict_of = lambda model: KEPT
started = time.perf_counter()
CALL
ended = time.perf_counter()
print(ended - started, ended - began)
"""


def seconds(case: str, mode: str, verdicts: str) -> dict[str, float]:
    """The time of one call in a process of its own, alone and with the imports before it.

    Args:
        case: a key of `CALLS`.
        mode: `first`, `second` or `without`, in this order.
        verdicts: folder of the verdicts that are kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = CHILD.replace("VERDICTS", repr(verdicts)).replace("CALL", CALLS[case])
        done = subprocess.run(
            [sys.executable, "-c", code, folder, mode], capture_output=True, text=True, check=True, env=os.environ
        )
    return dict(zip(("call", "process"), map(float, done.stdout.splitlines()[-1].split()), strict=True))


def measure(case: str, turns: int) -> list[dict[str, Any]]:
    """The first and the second time, each beside a call without the trial."""
    times: dict[str, list[dict[str, float]]] = {"first": [], "second": [], "without": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as verdicts:
            for mode in times:
                times[mode].append(seconds(case, mode, verdicts))
    rows = []
    for mode, part in product(("first", "second"), ("call", "process")):
        mine, bare = ([each[part] for each in times[name]] for name in (mode, "without"))
        ratios = [a / b for a, b in zip(mine, bare, strict=True)]
        row = harness.row(
            f"{case}, the {mode} time", part, "s", "lower", ours=statistics.median(mine), base=statistics.median(bare)
        )
        rows.append(row | {"spread": [min(ratios), max(ratios)], "note": f"{min(ratios):.3f} to {max(ratios):.3f}"})
    return rows


def main() -> None:
    """Each case in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cases", default=",".join(CALLS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    )
    rows = [row for case in CALLS if case in options.cases.split(",") for row in measure(case, options.turns)]
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
