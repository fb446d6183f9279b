"""Workers on the devices of this machine: each has its device, a dead one loses nothing, and none outlives the run."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.support.shards import pieces, write_place

from lorary.errors import TaskError, TrainError
from lorary.train.choose_executor import make_executor
from lorary.train.executor import Executor
from lorary.train.process_pool import ProcessExecutor, worker_devices


@pytest.fixture(autouse=True)
def findable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find what this process finds by its path, and pytest finds the tests without one."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3])


def places(folder: Path, *names: str) -> list[Sequence[str]]:
    return [(folder / name).read_text().split() for name in names]


@pytest.mark.parametrize(
    ("device", "count", "workers", "devices"),
    [
        ("auto", 3, 2, ["cuda:0", "cuda:1"]),
        ("auto", 2, 5, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 2, 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, 2, ["cuda:1", "cuda:1"]),
        ("cpu", 8, 2, ["cpu", "cpu"]),
        ("auto", 0, 2, ["auto", "auto"]),
        ("cuda", 0, 1, ["cuda"]),
    ],
)
def test_devices_are_dealt_to_workers_in_turn(
    monkeypatch: pytest.MonkeyPatch, device: str, count: int, workers: int, devices: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert worker_devices(device, workers) == devices
    executor = make_executor("local", workers=workers, device=device)
    assert isinstance(executor, ProcessExecutor)
    assert isinstance(executor, Executor)
    assert executor.devices == devices


def test_each_worker_is_a_process_with_its_device_that_takes_shard_after_shard(tmp_path: Path) -> None:
    said: list[str] = []
    ProcessExecutor(["cpu", "meta"], say=said.append).run(write_place, pieces(tmp_path, *"abcdef"))
    by_device: dict[str, set[str]] = {}
    for device, process, threads in places(tmp_path, *"abcdef"):
        by_device.setdefault(device, set()).add(process)
        assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert {device: len(processes) for device, processes in by_device.items()} == {"cpu": 1, "meta": 1}
    assert str(os.getpid()) not in set.union(*by_device.values())
    assert any(line.startswith("worker 2 (meta) finished expert ") for line in said)
    assert any(line.startswith("worker 1: at ") for line in said)
    for line in said:
        if " starts, process " in line:
            with pytest.raises(ProcessLookupError):
                os.kill(int(line.rpartition(" ")[2]), 0)


def test_what_dies_or_breaks_is_tried_again_in_a_new_process_and_what_is_refused_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    names = ("dies", "breaks", "refused", "a")
    with pytest.raises(TaskError) as caught:
        ProcessExecutor(["cpu"], say=said.append).run(write_place, pieces(tmp_path, *names))
    assert str(caught.value) == "expert 'refused': no rows\nfound: refused"
    places(tmp_path, "dies", "breaks", "a")  # all were finished
    text = "\n".join(said)
    assert "worker 1 (cpu): the process is gone: Killed\nexpert 'dies': try 2 of 4 follows" in text
    assert "Stale file handle\nexpert 'breaks': try 2 of 4 follows" in text
    assert text.count(" starts, process ") == 3


def test_a_shard_that_kills_every_process_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"expert 'dies-always' must be trained within 4 tries\nfound: the process is"):
        ProcessExecutor(["cpu"], say=lambda line: None).run(write_place, pieces(tmp_path, "dies-always"))


def test_without_shards_nothing_starts() -> None:
    ProcessExecutor(["cpu"]).run(write_place, [])


def test_an_interrupt_is_passed_on_so_that_workers_keep_what_they_have(tmp_path: Path) -> None:
    processes = []

    def say(line: str) -> None:
        if " starts, process " in line:
            processes.append(int(line.rpartition(" ")[2]))
        if "at waits" in line:
            raise KeyboardInterrupt  # as a signal would, in the middle of the run

    with pytest.raises(KeyboardInterrupt):
        ProcessExecutor(["cpu"], say=say).run(write_place, pieces(tmp_path, "waits"))
    assert (tmp_path / "waits-kept").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0], 0)


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
        "from tests.support.shards import *\n"
        "from lorary.train.process_pool import ProcessExecutor\n"
        "ProcessExecutor(['cpu']).run(write_place, pieces(Path(sys.argv[1]), 'waits'))\n"
    )
    top = Path(__file__).parents[3]
    command = [sys.executable, "-c", script, str(tmp_path), str(top), str(top / "src")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None
        worker = int(parent.stderr.readline().rpartition(" ")[2])
        assert parent.stderr.readline().startswith("worker 1: at waits on cpu")
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {worker} goes on")
