"""An evaluation that is killed: the next run goes on where it was, and at most one cell is computed twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Runs of one evaluation, each in a process forked off one whose imports are done. Each but the last is killed at the
# second cell that it scores: before it, behind it, or in the midst of writing it down.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lorary.evaluate.cache import ResultCache
from lorary.evaluate import scorer
from lorary.recipes.evaluate import evaluate

one, two, tasks, log = sys.argv[1:5]
score, put = scorer.score_rows, ResultCache.put
DIE = lambda: os.kill(os.getpid(), signal.SIGKILL)

def run(moment):
    calls = 0

    def counted(*args, **more):
        nonlocal calls
        calls += 1
        with open(log, "a") as file:
            file.write(args[3][0].task + "\\n")
        if calls == 2 and moment == "before":
            DIE()
        return score(*args, **more)

    def torn(self, key, value):
        if calls == 2 and moment == "behind":
            DIE()
        if calls == 2 and moment == "midst":
            with open(self._path, "a") as file:
                file.write("\\n" + json.dumps({"key": key, "value": value})[:-9])
            DIE()
        put(self, key, value)

    scorer.score_rows, ResultCache.put = counted, torn
    done = evaluate(one, tasks, also=[two], routers=["arrow", "uniform", "arrow[top_k=1]"], rows=2)
    print(json.dumps(done.to_json()), flush=True)

for number in range(9):
    child = os.fork()
    if not child:
        run(("before", "behind", "midst")[number % 3] if number < 3 else "never")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(number, flush=True)
        break
"""


def test_an_evaluation_killed_at_any_moment_loses_one_cell_at_most(
    tiny_base_folder: Path, tmp_path: Path, tiny_model: Any, random_adapter: Any, generator: Any
) -> None:
    from lorary.library.store import Library
    from lorary.recipes.evaluate import evaluate

    def library(name: str) -> str:
        made = Library.create(tmp_path / name, str(tiny_base_folder))
        for task in ("a", "b"):
            made.add_adapter(random_adapter(tiny_model(), task, generator), {"tasks": [task]})
        return str(made.path)

    one, two = library("one"), library("two")
    rows = [
        {"task": task, "split": split, "source": f"{task} {i}:", "target": "up"}
        for task in ("a", "b") for split in ("val", "test") for i in range(2)
    ]  # fmt: skip
    tasks, log = tmp_path / "tasks.jsonl", tmp_path / "log.txt"
    tasks.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, one, two, str(tasks), str(log)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    document, kills = json.loads(done.stdout.splitlines()[-2]), int(done.stdout.splitlines()[-1])
    assert kills == 3
    cells = 2 + 2 * 3 * 2  # the base once, three routers of two libraries, on two tasks
    assert len(log.read_text().split()) == cells + kills
    again = evaluate(one, str(tasks), also=[two], routers=["arrow", "uniform", "arrow[top_k=1]"], rows=2)
    assert json.loads(json.dumps(again.to_json())) == document
