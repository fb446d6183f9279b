"""A build that is killed: the library stays whole, the next run goes on, and the outcome is the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorary.library.store import Library

NAMES = ("five", "four", "one", "three", "two")
EXPERTS = {
    "private": [*NAMES],
    "mbc": ["cluster_0", "cluster_1", "cluster_2"],
    "k": None,  # one or two clusters: the build itself chooses
    "poly": [f"skill_{number}" for number in range(8)],
}
KILLS = {"private": 5, "mbc": 20, "k": 4, "poly": 5}

# Builds on request, each in a process of its own that is forked off one whose imports are done: a start takes
# milliseconds. Two experts are trained at a time, so that some end while others wait, and state is saved at each step.
NURSERY = """
import json, os, sys, traceback
import torch
torch.set_num_threads(1)
import sklearn.cluster
from lorary.build.methods import MethodSettings
from lorary.recipes.build import run_build
from lorary.build.settings import BuildSource, RunSettings, preset
from lorary.build.cluster_settings import ClusterSettings
tasks, base = sys.argv[1:3]
settings = preset("default", rank=2, steps=24, batch_size=2, evals=4, learning_rate=0.02)
run = RunSettings(window=2, save_every_s=1e-9)

def build(library, method):
    k = (1, 2) if method == "k" else (3,)
    how = MethodSettings("mbc" if method == "k" else method, ClusterSettings(k=k, private_steps=12))
    result = run_build(tasks, library, settings, how, source=BuildSource(base), run=run)
    print("trained", *result.trained, flush=True)

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            build(*json.loads(line))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    sys.stdin.readline()  # until then the child's number remains its own, dead or alive
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


class Nursery:
    """The process that builds are forked off."""

    def __init__(self, tasks: Path, base: Path, errors: Path) -> None:
        self.errors = errors
        with open(errors, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", NURSERY, str(tasks), str(base)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self._read() == "ready", errors.read_text()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def build(self, library: Path, method: str, kill_after_s: float | None = None) -> list[str] | None:
        """Names of the experts that a build trained; None where it was killed before it ended."""
        self._write(json.dumps([str(library), method]))
        child, words = int(self._read()), ""
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)
        self._write("wait")
        status = self._read()
        if status.startswith("trained"):
            words, status = status, self._read()
        assert int(status) in (0, signal.SIGKILL), self.errors.read_text()
        return words.split()[1:] if int(status) == 0 else None


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tasks."""
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    with open(path, "w") as file:
        for name in NAMES:
            for split, count in (("train", 8), ("val", 3)):
                for i in range(count):
                    row = {"task": name, "split": split, "source": f"{name} {split} {i}:", "target": name}
                    file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def nursery(tasks: Path, tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """A nursery over the five tasks, gone after the tests."""
    made = Nursery(tasks, tiny_base_folder, tmp_path_factory.mktemp("nursery") / "errors.txt")
    yield made
    made.process.kill()
    made.process.communicate()


def adapters(library: Path) -> dict[str, bytes]:
    """Bytes of every file of every committed adapter."""
    folder = library / "adapters"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def derived(library: Path) -> dict[str, bytes]:
    """Bytes of every recorded clustering."""
    folder = library / "derived"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stage_of(library: Path) -> str:
    """How far a build of clusters has come."""
    if derived(library):
        return "retrain"
    return "private" if (library / ".build" / "private" / "library.json").exists() else "start"


@pytest.mark.parametrize("method", EXPERTS)
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(nursery: Nursery, method: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    names = nursery.build(whole, method)
    duration = time.monotonic() - began
    assert names is not None
    assert EXPERTS[method] in (None, names)

    chance, kills = random.Random(0), KILLS[method]
    finished: dict[str, bytes] = {}
    stages: set[str] = set()
    rounds = 0
    while kills:
        stages.add(stage_of(killed))
        if nursery.build(killed, method, chance.uniform(0.02, 0.5) * duration) is None:
            kills -= 1
        else:  # too quick for this kill: what it made is compared, and another build takes the next kills
            assert adapters(killed) == adapters(whole)
            rounds += 1
            killed, finished = tmp_path / f"killed-{rounds}", {}
        if (killed / "library.json").exists():
            assert Library.open(killed).verify() == []
        now = adapters(killed)
        assert {name: now.get(name) for name in finished} == finished
        finished = now
    already = sorted({Path(name).parts[0] for name in finished})
    trained = nursery.build(killed, method)
    assert trained is not None
    assert sorted([*trained, *already]) == names  # nothing finished was trained again
    assert adapters(killed) == adapters(whole)
    assert derived(killed) == derived(whole)
    assert {path.name for path in (killed / ".build").iterdir()} <= {"private"}
    if method == "mbc":
        assert stages >= {"private", "retrain"}
        assert adapters(killed / ".build" / "private") == adapters(whole / ".build" / "private")


def test_a_pass_killed_between_two_commits_does_not_train_again(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.build.settings import BuildSource, preset
    from lorary.recipes import build as recipe

    settings = preset("default", rank=2, steps=4, batch_size=2, evals=1)
    commit, steps = Library.add_adapter, []

    def commit_once(self: Library, adapter: Any, provenance: Any) -> str:
        if len(self) == 1:
            raise KeyboardInterrupt
        return commit(self, adapter, provenance)

    monkeypatch.setattr(Library, "add_adapter", commit_once)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_build(str(tasks), str(tmp_path / "lib"), settings, source=BuildSource(str(tiny_base_folder)))
    monkeypatch.setattr(Library, "add_adapter", commit)

    from lorary.train.forward import Forward

    step = Forward.train_losses
    monkeypatch.setattr(Forward, "train_losses", lambda *args: steps.append(1) or step(*args))
    result = recipe.run_build(str(tasks), str(tmp_path / "lib"), settings, source=BuildSource(str(tiny_base_folder)))
    assert len(result.trained) == 4
    assert len(result.kept) == 1
    assert steps == []  # the finished pass was taken from its checkpoint


def test_a_second_build_on_the_same_library_is_refused_at_once(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    from lorary.build.settings import BuildSource, preset
    from lorary.errors import LibraryError
    from lorary.recipes.build import run_build

    library = Library.create(tmp_path / "lib", str(tiny_base_folder))
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom lorary.library.store import Library\n"
            f"library = Library.open({str(library.path)!r})\n"
            "with library.build_lock():\n    print('held', flush=True)\n    time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LibraryError, match=str(holder.pid)):
            run_build(
                str(tasks), str(library.path), preset("default", steps=1), source=BuildSource(str(tiny_base_folder))
            )
    finally:
        holder.kill()
        holder.communicate()


def test_a_full_disk_stops_a_build_with_one_error_and_a_whole_library(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from lorary.build.settings import BuildSource, preset
    from lorary.errors import LoraryError
    from lorary.recipes.build import run_build

    settings = preset("default", rank=2, steps=4, batch_size=2, evals=2)
    real = os.fsync

    def full(descriptor: int) -> None:
        if "checkpoint" in checks or ".build" not in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    library = Library.create(tmp_path / "lib", str(tiny_base_folder))
    for checks in (("checkpoint",), ("commit",)):  # noqa: B007 - `full` above reads it
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(LoraryError, match="No space left"):
            run_build(str(tasks), str(library.path), settings, source=BuildSource(str(tiny_base_folder)))
        monkeypatch.setattr(os, "fsync", real)
        assert library.verify() == []
        assert library.names() == []
    assert len(
        run_build(str(tasks), str(library.path), settings, source=BuildSource(str(tiny_base_folder))).trained
    ) == len(NAMES)
