"""Injected faults: a small run of the benchmark finds nothing wrong, each fault that was mended stays mended."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Each runs in a process that is forked for it, and uses no threads of the parent's.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    if not Path("/proc/self/fd").exists():
        pytest.skip("the benchmark finds files by /proc/self/fd, which this system does not have")
    sys.path.insert(0, str(BENCHMARKS))
    import faults

    yield faults
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def bench(faults: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return faults.Bench(tmp_path_factory.mktemp("faults"), faults.Findings())


# Operation, call, how many of these are passed over and how many disturbed, and the fault.
MENDED = {
    "a part of a remote's index that cannot be kept is named": ("pull", "replace", 0, 1, "EACCES"),
    "a clone without room says so": ("clone", "write", 1, 2, "ENOSPC"),
    "a remote that may not be looked at is named": ("push anew", "stat", 4, 1, "EIO"),
    "results that may not be looked at are named": ("push", "stat", 60, 6, "EIO"),
    "a pull that is killed leaves the old or the new library": ("pull", "rename", 0, 6, "killed after"),
    "prepared data outlive a failure in their replacement": ("prepare", "fsync", 15, 3, "ENOSPC"),
}


@pytest.mark.parametrize("case", MENDED)
def test_a_fault_that_was_mended(bench: Any, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    name, call, first, number, kind = MENDED[case]
    (operation,) = (operation for operation in bench.operations if operation.name == name)
    places = [at for at, each in enumerate(bench.calls(operation)) if each == call][first : first + number]
    assert places
    bench.findings.wrong.clear()
    for at in places:
        bench.disturb(operation, {at: kind})
    assert bench.findings.wrong == []


def test_faults_at_random_calls_leave_the_old_or_the_new(
    faults: ModuleType, bench: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.findings.wrong.clear()
    some = [
        operation for operation in bench.operations if operation.name in ("add several", "replace", "results", "pull")
    ]
    for number, (operation, chosen) in enumerate(faults.schedule(bench, some, 24, random.Random(0))):
        bench.disturb(operation, chosen, beside=number % 10 == 0)
    assert bench.findings.wrong == []


def test_what_is_wrong_is_found(faults: ModuleType, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (operation,) = (operation for operation in bench.operations if operation.name == "add")
    bench.calls(operation)
    bench.findings.wrong.clear()
    with monkeypatch.context() as patch:
        patch.setitem(bench._states, "add", [{"router": "", "adapters": {}, "derived": {}, "results": {}}] * 2)
        bench.disturb(operation, {0: "EIO"})
    with monkeypatch.context() as patch:
        patch.setattr(faults, "LEFTOVERS", (".lock",))
        bench.disturb(operation, {0: "EIO"})
    with monkeypatch.context() as patch:
        patch.setattr(faults, "LoraryError", ZeroDivisionError)
        bench.disturb(operation, {0: "EIO"})
    reasons = ("after it: router is", "left over: ['lib/.transfer.lock'", "LibraryError")
    assert len(bench.findings.wrong) == 3
    for wrong, reason in zip(bench.findings.wrong, reasons, strict=True):
        assert reason in wrong
