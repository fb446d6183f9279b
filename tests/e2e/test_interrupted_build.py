"""A build that is killed: the library stays whole, the next run goes on, and the outcome is the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorary.library.store import Library

NAMES = ("five", "four", "one", "three", "two")

# Builds with a window of two experts, so that passes end while others wait, and says when a pass begins and ends.
SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from lorary.recipes.build import run_build
from lorary.recipes.build_settings import preset
tasks, library, base = sys.argv[1:4]
settings = preset("default", rank=2, steps=24, batch_size=2, evals=4, learning_rate=0.02)
print("ready", flush=True)
result = run_build(tasks, library, settings, base=base, window=2)
print("trained", *result.trained, flush=True)
"""


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


def start(tasks: Path, library: Path, base: Path) -> "subprocess.Popen[str]":
    """Start a build and wait until its imports are done."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tasks), str(library), str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def adapters(library: Path) -> dict[str, bytes]:
    """Bytes of every file of every committed adapter."""
    folder = library / "adapters"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(tasks, whole, tiny_base_folder)
    began = time.monotonic()
    out, err = process.communicate(timeout=120)
    duration = time.monotonic() - began
    assert process.returncode == 0, err
    assert out.split() == ["trained", *NAMES]

    chance = random.Random(0)
    finished: dict[str, bytes] = {}
    for _ in range(4):
        process = start(tasks, killed, tiny_base_folder)
        time.sleep(chance.uniform(0.05, 0.45) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (killed / "library.json").exists():
            assert Library.open(killed).verify() == []
        now = adapters(killed)
        assert {name: now.get(name) for name in finished} == finished
        finished = now
    already = sorted({Path(name).parts[0] for name in finished})
    process = start(tasks, killed, tiny_base_folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert sorted([*out.split()[1:], *already]) == sorted(NAMES)  # nothing finished was trained again
    assert adapters(killed) == adapters(whole)
    assert not list((killed / ".build").glob("*"))


def test_a_pass_killed_between_two_commits_does_not_train_again(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.recipes import build as recipe
    from lorary.recipes.build_settings import preset

    settings = preset("default", rank=2, steps=4, batch_size=2, evals=1)
    commit, steps = Library.add_adapter, []

    def commit_once(self: Library, adapter: Any, provenance: Any) -> str:
        if len(self) == 1:
            raise KeyboardInterrupt
        return commit(self, adapter, provenance)

    monkeypatch.setattr(Library, "add_adapter", commit_once)
    with pytest.raises(KeyboardInterrupt):
        recipe.run_build(str(tasks), str(tmp_path / "lib"), settings, base=str(tiny_base_folder))
    monkeypatch.setattr(Library, "add_adapter", commit)

    from lorary.train import loop

    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    result = recipe.run_build(str(tasks), str(tmp_path / "lib"), settings, base=str(tiny_base_folder))
    assert len(result.trained) == 4
    assert len(result.kept) == 1
    assert steps == []  # the finished pass was taken from its checkpoint


def test_a_second_build_on_the_same_library_is_refused_at_once(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    from lorary.errors import LibraryError
    from lorary.recipes.build import run_build
    from lorary.recipes.build_settings import preset

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
            run_build(str(tasks), str(library.path), preset("default", steps=1), base=str(tiny_base_folder))
    finally:
        holder.kill()
        holder.communicate()


def test_a_full_disk_stops_a_build_with_one_error_and_a_whole_library(
    tasks: Path, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from lorary.errors import LoraryError
    from lorary.recipes.build import run_build
    from lorary.recipes.build_settings import preset

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
            run_build(str(tasks), str(library.path), settings, base=str(tiny_base_folder))
        monkeypatch.setattr(os, "fsync", real)
        assert library.verify() == []
        assert library.names() == []
    assert len(run_build(str(tasks), str(library.path), settings, base=str(tiny_base_folder)).trained) == len(NAMES)
