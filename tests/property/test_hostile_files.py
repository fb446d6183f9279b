"""Files of strangers, drawn at random: each reader returns what the file says, or raises a named error."""

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.errors import LoraryError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Of which a machine with other work to do has too much.
MEASURES = (" s", " MB")


class Fuzzer(NamedTuple):
    """The scripts of the benchmark, and what they draw from."""

    fuzz: Any
    targets: Any
    whole: Any
    readers: Any
    meter: Any


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    if not Path("/proc/self/status").exists():
        pytest.skip("the benchmark reads memory from /proc, which this system does not have")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.syspath_prepend(BENCHMARKS)
        import fuzz
        import fuzz_targets

        folder = tmp_path_factory.mktemp("fuzz")
        whole = fuzz_targets.make_whole(folder / "whole")
        fuzz_targets.check_readers(whole, folder)
        yield Fuzzer(fuzz, fuzz_targets, whole, fuzz_targets.Readers(whole, folder / "place"), fuzz.Meter())


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_as_it_is_or_refused_by_name(fuzzer: Fuzzer, seed: int) -> None:
    case = fuzzer.targets.draw(fuzzer.whole, random.Random(seed))
    _, findings = fuzzer.fuzz.judge(case, fuzzer.readers, fuzzer.meter)
    assert [finding for finding in findings if not finding.what.endswith(MEASURES)] == []


@pytest.mark.parametrize(
    ("error", "finding"),
    [
        (KeyError("x"), "KeyError"),
        (RecursionError(), "RecursionError"),
        ("no name", "names no file"),
        (None, "taken in"),
    ],
)
def test_what_is_wrong_is_found(
    fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch, error: Exception | str | None, finding: str
) -> None:
    def read() -> None:
        if error is not None:
            raise LoraryError(error) if isinstance(error, str) else error

    case = fuzzer.targets.Case("adapter", dict(fuzzer.whole.trees["adapter"]), ["x"], True, "adapter_config.json")
    calls = [("read_adapter", read)]
    monkeypatch.setattr(fuzzer.targets.Readers, "calls", lambda self, case, folder: iter(calls))
    _, findings = fuzzer.fuzz.judge(case, fuzzer.readers, fuzzer.meter)
    assert [finding in each.what for each in findings] == [True]


def test_a_tensor_from_another_place_is_found(fuzzer: Fuzzer) -> None:
    case = fuzzer.targets.Case("adapter", dict(fuzzer.whole.trees["adapter"]), ["x"])
    folder = fuzzer.readers.write(case)
    adapter = fuzzer.targets.read_adapter(folder)
    fuzzer.targets._checked(adapter, folder)
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-4] + b"\0\0\0\1")
    with pytest.raises(fuzzer.targets.WrongError, match="not the bytes of its place"):
        fuzzer.targets._checked(adapter, folder)
