"""A build on a real Ray cluster of this machine: a worker is killed, or the head, in the middle of the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from lorary.build.build_library import BuildResult
from lorary.build.settings import BuildSettings, BuildSource, RunSettings
from lorary.errors import LibraryError
from lorary.library.store import Library
from lorary.recipes.build import run_build

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lorary[ray]'")

NAMES = ("four", "one", "three", "two")
OPTIONS = {"rank": 2, "steps": 200, "batch_size": 2, "evals": 2}
# The command, with less patience for a head that is gone.
COMMAND = """
from lorary.cli import main
from lorary.train.ray_pool import RayExecutor
RayExecutor.__init__.__kwdefaults__["head_timeout_s"] = 3.0
main()
"""
TIMEOUT_S = 300.0
LEAVING_S = 30.0  # in which workers end themselves


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks."""
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    with open(path, "w") as file:
        for name in NAMES:
            for split, count in (("train", 8), ("val", 3)):
                for i in range(count):
                    row = {"task": name, "split": split, "source": f"{name} {split} {i}:", "target": name}
                    file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Ray's files go to a folder of their own (a short path: sockets lie in it), its token beside them."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    own = {"HOME": folder, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    yield {**{name: value for name, value in os.environ.items() if not name.startswith("RAY_")}, **own}
    shutil.rmtree(folder, ignore_errors=True)


class Build:
    """`lorary build --executor ray` in a process of its own, one expert per shard, over two workers."""

    def __init__(self, tasks: Path, library: Path, base: Path, environment: dict[str, str]) -> None:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        where = ["--base", str(base), "--library", str(library), "--window=1", "--executor=ray", "--workers=2"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "build", str(tasks), *where, *options, "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self.family: list[psutil.Process] = []

    def wait_for(self, words: str) -> str:
        """Read stderr up to a line with these words."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.strip())
            if words in line:
                self.family = psutil.Process(self.process.pid).children(recursive=True)
                return line
        pytest.fail(f"the build ended without '{words}':\n" + "\n".join(self.lines))

    def finish(self) -> tuple[int, str]:
        """Exit code and stdout."""
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        self.lines += err.splitlines()
        return self.process.returncode, out

    def close(self) -> None:
        """End what still runs, and fail if that is a worker: a worker without a build must end itself."""
        self.process.kill()
        self.process.communicate()
        pids = {worker_process(line) for line in self.lines if line.endswith("is ready")}
        _, left = psutil.wait_procs([process for process in self.family if process.pid in pids], timeout=LEAVING_S)
        # Ray's own helpers take half a minute to notice that their head is gone: no need to wait for that.
        for process in self.family:
            if process.is_running():
                process.kill()
        assert left == []


@pytest.fixture
def build(tasks: Path, tiny_base_folder: Path, environment: dict[str, str], tmp_path: Path) -> Iterator[Build]:
    """A build into the library `ray`."""
    build = Build(tasks, tmp_path / "ray", tiny_base_folder, environment)
    yield build
    build.close()


def build_here(tasks: Path, library: Path, base: Path) -> BuildResult:
    settings: Any = BuildSettings(**OPTIONS)
    return run_build(str(tasks), str(library), settings, source=BuildSource(str(base)), run=RunSettings(window=1))


def worker_process(line: str) -> int:
    """From `worker 1 (HOST, process 123) ...`."""
    return int(line.split("process ")[1].split(")")[0])


def check_equal(library: Path, other: Path) -> None:
    """All experts are there, whole, and the same up to rounding."""
    for folder in (library, other):
        assert Library.open(folder).names() == list(NAMES)
        assert Library.open(folder).verify() == []
    for name in NAMES:
        a, b = (load_file(folder / "adapters" / name / "adapter_model.safetensors") for folder in (library, other))
        assert a.keys() == b.keys()
        assert all((a[key] - b[key]).abs().max() <= 1e-5 * b[key].abs().max() for key in a)


def test_the_experts_of_a_killed_worker_are_trained_by_another(
    build: Build, tasks: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    finished = build.wait_for("finished expert")
    with pytest.raises(LibraryError, match=str(build.process.pid)):  # a second build on the same library
        build_here(tasks, tmp_path / "ray", tiny_base_folder)
    time.sleep(0.2)  # its next expert is on the way
    os.kill(worker_process(finished), signal.SIGKILL)
    code, out = build.finish()
    told = "\n".join(build.lines)
    assert code == 0, told
    assert sorted(json.loads(out)["trained"]) == list(NAMES)
    assert "is gone: " in told
    assert "try 2 of 4 follows" in told
    assert "4 of 4 shards are done" in told
    build_here(tasks, tmp_path / "local", tiny_base_folder)
    check_equal(tmp_path / "ray", tmp_path / "local")


def test_when_the_head_is_killed_the_build_fails_clearly_and_a_rerun_without_ray_does_the_rest(
    build: Build, tasks: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    build.wait_for("finished expert")
    began = time.monotonic()
    for process in build.family:
        if process.name() in ("gcs_server", "raylet"):
            process.kill()
    code, out = build.finish()
    told = "\n".join(build.lines)
    assert code == 1, told
    assert out == ""
    assert time.monotonic() - began < 60  # Ray itself would end the process after that, without a word of ours
    assert "\nerror: the Ray cluster must stay reachable during a build\nfound: no answer from " in told
    assert build.lines[-1].startswith("remedy: what is finished stays in the library: run the same command again")
    assert "Traceback" not in told
    there = Library.open(tmp_path / "ray").names()
    assert there
    result = build_here(tasks, tmp_path / "ray", tiny_base_folder)
    assert (sorted(result.kept), sorted([*result.kept, *result.trained])) == (there, list(NAMES))
    assert Library.open(tmp_path / "ray").verify() == []
