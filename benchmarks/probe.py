"""What the trial of a base model costs: `load_base` and a small build, without it, the first time and the second time.

    python benchmarks/probe.py [--threads N] [--turns 7] [--cases load,build] [--json]

Each figure is the time of one call in a process of its own, imports of transformers included, as a user meets it.
`base` is the same call with the trial left out. The three take turns; figures are medians over the turns, and `spread`
holds the least and the largest ratio of a turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

CALLS = {
    "load": "load_base('embedded')",
    "build": "run_build('builtin', FOLDER + '/lib', preset('default', steps=4, upper_layers=6, val_rows=4), "
    "names=['sentiment', 'last_word'])",
}
CHILD = """
import sys, tempfile, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import lorary
from lorary.build.settings import preset
from lorary.model import kept, verdict
from lorary.model.base import load_base
from lorary.recipes.build import run_build
FOLDER, MODE = sys.argv[1:]
kept._place = lambda key: Path(VERDICTS) / f"{key}.json"
if MODE == "without":
    verdict.verdict_of = lambda model: kept.Verdict()
started = time.perf_counter()
CALL
print(time.perf_counter() - started)
"""


def seconds(case: str, mode: str, verdicts: str) -> float:
    """The time of one call in a process of its own.

    Args:
        case: a key of `CALLS`.
        mode: `without`, `first` or `second`.
        verdicts: folder of the verdicts that are kept.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = CHILD.replace("VERDICTS", repr(verdicts)).replace("CALL", CALLS[case])
        done = subprocess.run(
            [sys.executable, "-c", code, folder, mode], capture_output=True, text=True, check=True, env=os.environ
        )
    return float(done.stdout.splitlines()[-1])


def measure(case: str, turns: int) -> list[dict[str, Any]]:
    """The first and the second time, each beside a call without the trial."""
    times: dict[str, list[float]] = {"without": [], "first": [], "second": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as verdicts:
            for mode in times:
                times[mode].append(seconds(case, mode, verdicts))
    rows = []
    for mode in ("first", "second"):
        ratios = [a / b for a, b in zip(times[mode], times["without"], strict=True)]
        ours, base = statistics.median(times[mode]), statistics.median(times["without"])
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        row = harness.row(f"{case}, the {mode} time", "seconds", "s", "lower", ours=ours, base=base)
        rows.append(row | {"spread": [min(ratios), max(ratios)], "note": spread})
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
