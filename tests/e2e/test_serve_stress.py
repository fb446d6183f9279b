"""The benchmark that puts a server under load: a small run finds nothing wrong, and what is wrong is found."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import httpx
import pytest
from forked_server import COMMANDS, ROOT
from served import make_library

BENCHMARKS = ROOT / "benchmarks"


class Scripts(NamedTuple):
    """The scripts of the benchmark."""

    stress: ModuleType
    answers: ModuleType
    clients: ModuleType


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Scripts:
    if not Path("/proc/self/status").exists():
        pytest.skip("the benchmark reads memory from /proc, which this system does not have")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import serve_stress
    import serve_stress_answers
    import serve_stress_clients

    return Scripts(serve_stress, serve_stress_answers, serve_stress_clients)


def test_nothing_is_wrong_under_all_that_clients_do(
    scripts: Scripts, forking_place: str, tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (sys.executable, "-I", "-S", str(COMMANDS), forking_place, str(BENCHMARKS / "serve_stress.py"))
    monkeypatch.setattr(scripts.stress, "COMMAND", command)
    library = make_library(tmp_path / "made", tiny_base_folder)
    options = ("--clients", "8", "--requests", "90", "--prompts", "2", "--answer", "5")
    folder = tmp_path / "run"
    folder.mkdir()
    result = scripts.stress.measure(scripts.stress.parsed([str(library.path), *options]), folder)
    assert result["faults"] == [], result["examples"]
    assert [each["places"] for each in result["marks"]] == [0, 0, 0, 0]
    kinds = set(result["requests"])
    assert {"whole", "streamed", "left half-way", "add", "watch"} <= kinds
    asked = sum(sum(result["requests"][kind].values()) for kind in kinds - {"watch", "add", "replace", "remove"})
    assert asked == 90
    assert "nothing is wrong" in scripts.stress.table(result)


class Judged:
    """One request that was answered at once, while the live adapter was being added."""

    def __init__(self, scripts: Scripts) -> None:
        texts = {("lib", 0, "without"): ["a", "a b"], ("lib", 0, "first"): None, ("lib", 0, "second"): ["z"]}
        expected = scripts.answers.Expected(["?"], ["lib"], 99, {}, texts)
        self.clients = scripts.clients.Clients("http://127.0.0.1:1", "secret", "root", expected, 2)
        self.clients.timeline.begin("first")

    def outcome(self, status: int, texts: list[str], most: int = 2, **headers: str) -> str:
        response = httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()})
        self.clients.findings.requests.clear()
        self.clients._judge("whole", "lib", 0, most, 1.0, response, texts)
        ((_, outcome),) = self.clients.findings.requests
        return str(outcome)


def test_what_is_wrong_is_found(scripts: Scripts) -> None:
    judged = Judged(scripts)
    assert [judged.outcome(200, ["a b"]), judged.outcome(200, ["a"], most=1)] == ["right", "right"]
    assert judged.outcome(404, []) == "refused"  # by the state that is being made
    assert judged.outcome(429, [], retry_after="1") == "busy"
    assert judged.outcome(503, []) == "503"
    for status, texts in ((200, ["a"]), (200, ["a b", "b"]), (200, []), (200, ["z"]), (500, []), (429, []), (401, [])):
        assert judged.outcome(status, texts) == "wrong", (status, texts)
    judged.clients.timeline.end()
    assert judged.outcome(404, []) == "refused"
    assert judged.outcome(200, ["a b"]) == "right"  # it began before
    timeline = judged.clients.timeline
    assert timeline.during(timeline.changes[-1][2] + 1, timeline.changes[-1][2] + 2) == {"first"}


def test_each_fault_is_named(scripts: Scripts) -> None:
    stress, findings = scripts.stress, scripts.clients.Findings()

    def faults(*, rss: float = 400, objects: int = 500_000, places: int = 0, code: int = 0, errors: str = "") -> Any:
        marks = [stress.Mark("start", 300, 1, 1, 0), stress.Mark("first third", 400, 500_000, 1, 0)]
        marks.append(stress.Mark("end", rss, objects, 1, places))
        return stress.faults(findings, marks, code, errors)

    assert faults() == []
    assert faults(rss=500) == ["memory grew from 400 to 500 MiB"]
    assert faults(objects=600_000) == ["objects grew from 500000 to 600000"]
    assert faults(places=1) == ["places stayed in use"]
    assert faults(code=1) == ["the server ended with exit code 1"]
    assert faults(errors="error: KeyError in a request") == ["the server wrote of errors"]
    findings.statuses[500] += 2
    findings.note("whole", "a wrong text")
    assert len(faults()) == 2
