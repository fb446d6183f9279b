"""Routing over a library: the bare base, our rules, PEFT's Arrow and single adapters of PEFT's, in one interleaved run.

    python benchmarks/route.py [--only embedded,decode-1] [--experts 10,64,256] [--seconds 20] [--all]
                               [--threads N] [--report FILE.md] [--json]

Made adapters of rank 4 on all linear layers, top 4, float32, on the CPU, over two bases: the embedded one, and two
layers of Mistral-7B's shapes with random weights. Contenders over the same weights take turns in one process, round by
round; figures are medians over rounds.

* `prefill-N`: one pass over N tokens, logits of all of them, without a cache. `decode-B`: one step of B rows behind a
  cache of 128 tokens, the median of 15. Single adapters and the rules beside Arrow have no turn at 2,048 tokens.
* `auto` takes one expert for each request, by prompts that were made up; its time of a prompt has the decision in it, a
  pass of the bare base. Its `floor` is that of one expert, without the decision.
* `E`: experts seated. E=1 is one adapter: ours as a fixed expert among 10, PEFT's beside its layers or merged.
* `floor`: the base's time and that of the bare matrix products that the rule cannot leave out (`route_floor.py`);
  `floor_ratio` is counted in multiply-adds instead. `spread`: least and largest ratio to the base in one round.
* `attach`: from adapters on disk to a model that is ready; PEFT computes its prototypes later, which is not counted.
  Beyond 64 experts PEFT has half a minute (five with `--all`), and its time is extrapolated in proportion, if it needs
  more.
* `memory`: see `memory.py`; 512 tokens, each contender in a process of its own. PEFT's at the smallest E, since it
  attaches its adapters anew.

`--all` runs every rule at every E and length, and measures PEFT's memory wherever it can run. The adapters (1.3 GB) lie
in the temporary folder while it runs.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from route_memory import measure
from route_models import BASES, MOST_PEER_EXPERTS, Contender, Shelf, load_model, routed_contenders, single_contenders
from route_page import save_report
from route_turns import CASES, run_case

EXPERTS = (10, 64, 256)
ONCE = ("attach", "memory")
PATIENCE_S, PATIENCE_ALL_S = 30.0, 300.0
START = time.monotonic()
Rows = list[dict[str, Any]]


def run_base(name: str, wanted: set[str], sizes: Sequence[int], *, seconds: float, all_rules: bool) -> Rows:
    """All rows of one base.

    Args:
        name: of the base.
        wanted: names of the cases, `attach` and `memory` among them.
        sizes: numbers of experts, ascending.
        seconds: that the rounds of a case may take.
        all_rules: whether every rule runs at every size.
    """
    with tempfile.TemporaryDirectory(prefix="lorary-benchmark-") as folder:
        shelf = Shelf(name, load_model(name), Path(folder))
        contenders, rows = [Contender("bare base", 0, shelf.model)], Rows()
        bare: dict[str, float] | None = None
        for experts in sizes:
            say(f"{name}: {experts} experts")
            shelf.grow(experts)
            seated, own = seat(shelf, all_rules=all_rules, is_first=experts == sizes[0], peer="attach" in wanted)
            contenders += seated
            rows += own if "attach" in wanted else []
            if "memory" in wanted:
                found, bare = measure(shelf, bare, peer=all_rules or experts == sizes[0])
                rows += found
        for case in (case for case in CASES if case.name in wanted):
            say(f"{name}: {case.name}")
            rows += run_case(case, shelf, contenders, seconds=seconds, all_rules=all_rules)
    return rows


def seat(shelf: Shelf, *, all_rules: bool, is_first: bool, peer: bool) -> tuple[list[Contender], Rows]:
    """Attach all adapters that the shelf holds now, ours and PEFT's.

    Args:
        shelf: base and library.
        all_rules: whether rules beside Arrow take part at this size.
        is_first: whether this is the smallest size: there they do, and single adapters too.
        peer: whether PEFT attaches more experts than it can run, for that figure alone.

    Returns:
        Contenders, and the row of the time it took.
    """
    experts = len(shelf.library)
    model, ours_s = shelf.attach()
    seated = routed_contenders(model, experts, all_rules=all_rules or is_first)
    if is_first:
        seated += single_contenders(shelf, model)
    case, runs = f"{shelf.name} attach E={experts}", experts <= MOST_PEER_EXPERTS
    if not runs and not peer:
        return [one.warm_up() for one in seated], [harness.row(case, "time to attach", "s", "lower", ours=ours_s)]
    theirs, peer_s, loaded = shelf.attach_peer(PATIENCE_ALL_S if runs or all_rules else PATIENCE_S)
    entry = harness.row(case, "time to attach", "s", "lower", ours=ours_s, peer=peer_s * experts / max(1, loaded))
    if theirs is None:
        entry["note"] = f"PEFT stopped at {loaded} adapters after {peer_s:.0f} s; its time is extrapolated"
    elif runs:
        seated.append(Contender("arrow", experts, theirs, is_peer=True))
    return [one.warm_up() for one in seated], [entry]


def say(text: str) -> None:
    """Tell who waits, and for how long already."""
    print(f"{time.monotonic() - START:5.0f} s  {text} ...", file=sys.stderr)


def main() -> None:
    """Run what was asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"some of {', '.join((*BASES, *ONCE, *(c.name for c in CASES)))}")
    parser.add_argument("--experts", default=",".join(map(str, EXPERTS)))
    parser.add_argument("--seconds", type=float, default=20.0, help="that the rounds of a case may take, at least two")
    parser.add_argument("--all", action="store_true", help="every rule at every E and length")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument("--report", type=Path, help="a Markdown file; its pictures go beside it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    words, figures = {*options.only.split(",")} - {""}, {*ONCE, *(case.name for case in CASES)}
    if unknown := words - {*BASES, *figures}:
        parser.error(f"--only must be some of {', '.join((*BASES, *sorted(figures)))}; found: {', '.join(unknown)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    sizes = sorted({int(size) for size in options.experts.split(",")})
    load, rows = os.getloadavg()[0], Rows()
    for name in BASES:
        if name in words or not words & {*BASES}:
            wanted = words & figures or figures
            rows += run_base(name, wanted, sizes, seconds=options.seconds, all_rules=options.all)
    if options.report:
        # Where the report lies on this machine is nobody's business.
        words = [word.replace(str(options.report), options.report.name) for word in sys.argv[1:]]
        command = " ".join(["python benchmarks/route.py", *words])
        save_report(rows, options.report, command=command, load=load)
    harness.report(rows, options.json)


if __name__ == "__main__":
    main()
