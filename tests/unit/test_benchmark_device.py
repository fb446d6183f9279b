"""The device benchmark runs on the CPU too, where it is small and says what it is."""

import inspect
import json
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--shapes", "tiny", "--layers", "1", "--device", "cpu"]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import device

    monkeypatch.setattr(device, "can_fuse", lambda place: False)  # Triton's interpreter would let it, where it is
    return device


def test_every_contender_is_measured_beside_the_base(
    device: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "CASES", (device.Case("prefill-8", 8), device.Case("decode-2", 1, batch=2, cached=4)))
    monkeypatch.setattr(device, "DECODE_STEPS", 3)
    report = tmp_path / "report.md"
    device.main([*TINY, "--experts", "4,5", "--report", str(report), "--json"])
    document = json.loads(capsys.readouterr().out)
    table = {(row["case"], row["figure"]): row for row in document["rows"]}
    assert len(table) == len(document["rows"])
    for case in ("prefill-8", "decode-2"):
        for experts in (4, 5):
            names = {name for label, name in table if label == f"tiny {case} E={experts}"}
            assert names == {"arrow", "contrast", "uniform"}
            arrow = table[f"tiny {case} E={experts}", "arrow"]
            assert arrow["ratio_to_base"] == pytest.approx(arrow["ours"] / arrow["base"])
            assert arrow["peer"] > 0
            assert arrow["spread"][0] <= arrow["spread"][1]
        assert table[f"tiny {case} E=1", "one expert"]["base"] > 0
    # 4 experts of rank 4 and a prototype of each, on 7 layers: what they weigh is no measurement.
    shapes = 4 * [(32, 32)] + 2 * [(32, 48)] + [(48, 32)]
    stored = sum(4 * (20 * d_in + 16 * d_out) + 8 * (2 * 16 + 5) for d_in, d_out in shapes)
    assert table["tiny attach E=4", "experts"]["ours"] >= stored / 1e9
    page = report.read_text(encoding="utf-8")
    assert "no accelerator: these are figures of the CPU" in page
    assert "memory and CUDA graphs: the device is cpu" in page
    assert str(tmp_path) not in page


@pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or TRITON_INTERPRET is not 1: make check-triton",
)
def test_the_fused_plan_is_measured_where_triton_can_run(device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "MOST_PEER_EXPERTS", 0)
    monkeypatch.setattr(device, "DECODE_STEPS", 3)
    ran, shrink = set[int](), fused_kernels().shrink
    monkeypatch.setattr(device, "can_fuse", lambda place: True)
    monkeypatch.setattr(fused_kernels(), "shrink", lambda x, down: (ran.add(len(x)), shrink(x, down))[1])
    cases = (device.Case("prefill-8", 8), device.Case("decode-2", 1, batch=2, cached=4))
    model = device.load_model("tiny", 1, torch.device("cpu"))
    rows = device.run_all("tiny", model, [4], cases, device.Clock(500.0))
    fused = {row["case"]: row for row in rows if row["figure"] == "arrow fused"}
    assert set(fused) == {"tiny prefill-8 E=4", "tiny decode-2 E=4"}
    assert all(row["ratio_to_base"] > 0 for row in fused.values())
    assert ran == {8, 2}


def fused_kernels() -> ModuleType:
    from lorary.lora import fused_kernels

    return fused_kernels


def test_what_fails_is_named_and_the_rest_is_measured(device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, case = device.seconds_of, device.Case("prefill-8", 8)
    monkeypatch.setattr(
        device, "seconds_of", lambda side, case: measure(side, case) if side.name != "contrast" else 1 / 0
    )
    monkeypatch.setattr(device.Shelf, "attach_peer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("much")))
    clock, model = device.Clock(100.0), device.load_model("tiny", 1, torch.device("cpu"))
    rows = device.run_all("tiny", model, [4], [case], clock)
    assert {row["figure"] for row in rows if row["case"] == "tiny prefill-8 E=4"} == {"arrow", "uniform"}
    assert "prefill-8, contrast over 4: ZeroDivisionError: division by zero" in clock.left_out
    assert "PEFT's Arrow over 4 experts: out of memory" in clock.left_out


def test_steps_over_a_static_cache_begin_behind_the_prompt_in_each_turn(
    device: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "DECODE_STEPS", 5)
    lengths = []

    def captured(step: Any, _device: torch.device) -> Any:
        cache = inspect.getclosurevars(step).nonlocals["cache"]
        return lambda: (lengths.append(int(cache.get_seq_length())), step())

    monkeypatch.setattr(device, "captured", captured)
    model = device.load_model("tiny", 1, torch.device("cpu"))
    run = device.graph_seconds(device.Side("base", 0, model), device.Case("decode-2", 1, batch=2, cached=4))
    assert run() > 0
    assert run() > 0
    assert lengths == 2 * [4, 5, 6, 7, 8]


def test_what_there_is_no_time_for_is_named(device: ModuleType) -> None:
    clock = device.Clock(10.0)
    model = device.load_model("tiny", 1, torch.device("cpu"))
    assert device.run_all("llama", model, [64], [], clock) == []
    assert "64 experts: no time was left" in clock.left_out


@pytest.mark.parametrize("wrong", [["--seconds", "541"], ["--only", "prefill-7"]])
def test_wrong_options_are_refused(device: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        device.main([*TINY, *wrong])
