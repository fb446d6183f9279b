"""`lorary serve`: its options, and its log, without a model."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from lorary.serve.upstream_settings import UpstreamSettings

ENTRY = {
    "kind": "decision", "time": 1.0, "endpoint": "chat", "model": "lib", "id": "chatcmpl-1", "router": "auto",
    "rule": "contrast", "is_fallback": False, "confidence": 2.0, "threshold": 0.0,
    "sentence": "auto, by contrast: june 100% (score 2.00 against a border of 0)",
    "experts": [{"name": "june", "weight": 1.0}], "rejected": [], "ms": 1.0, "num_tokens": 3,
}  # fmt: skip
LOST = {**ENTRY, "id": "chatcmpl-2", "is_fallback": True, "experts": [], "sentence": "auto: no expert fits"}
DRY = {**ENTRY, "id": "route-3", "endpoint": "route"}
SHADOW = {"kind": "shadow", "id": "chatcmpl-1", "time": 2.0, "router": "arrow", "winner": "june", "answered": "june",
          "agrees": True, "sentence": "arrow: each token chooses"}  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (ENTRY, LOST, DRY, SHADOW)))
    return path


def test_a_log_is_shown_again(run: Run, log: Path) -> None:
    shown = run("serve", "log", log)
    assert shown.code == 0
    lines = shown.out.splitlines()
    assert lines[0] == "chatcmpl-1  auto, by contrast: june 100% (score 2.00 against a border of 0)"
    assert lines[3] == "chatcmpl-1  shadow  arrow: each token chooses"
    assert lines[4:] == [
        "2 requests, 1 without an expert that fits; experts: june 1",
        "shadow arrow: as answered in 1 of 1",
    ]


def test_a_part_of_a_log_is_shown(run: Run, log: Path) -> None:
    one = json.loads(run("serve", "log", log, "--id", "chatcmpl-2", "--json").out)
    assert [entry["id"] for entry in one["decisions"]] == ["chatcmpl-2"]
    assert one["usage"] == {
        "requests": 2, "fallback": 1, "experts": {"june": 1}, "shadow": {"router": "arrow", "requests": 1, "agree": 1},
    }  # fmt: skip
    last = json.loads(run("serve", "log", log, "--last", 1, "--json").out)
    assert [entry["kind"] for entry in last["decisions"]] == ["shadow"]
    missing = run("serve", "log", log, "--id", "none")
    assert (missing.code, "--id" in missing.err) == (2, True)
    assert run("serve", "log", log.with_name("none")).code == 2


def test_a_library_and_its_log_are_told_apart(run: Run, tmp_path: Path) -> None:
    assert "FILE" in run("serve", "log", "--help").out
    assert "--shadow-share" in run("serve", "--help").out
    nothing = run("serve", tmp_path / "nothing")
    assert (nothing.code, "must be a library" in nothing.err) == (1, True)
    open_to_all = run("serve", tmp_path, "--host", "0.0.0.0")
    assert (open_to_all.code, "needs a token" in open_to_all.err) == (2, True)
    assert run("serve").code == 2


def test_replicas_are_asked_for_by_name(run: Run, tmp_path: Path) -> None:
    url = "http://127.0.0.1:8001/v1"
    for wrong, said in (
        (["--replicas", 2], "--replicas goes with --executor ray"),
        (["--executor", "threads"], "--executor must be one of local, ray"),
        (["--executor", "ray", "--replicas", 0], "--replicas must be"),
        (["--executor", "ray", "--upstream", url], "--upstream goes without --executor"),
    ):
        refused = run("serve", tmp_path, *wrong)
        assert (refused.code, said in refused.err) == (2, True), refused.err


def test_the_server_behind_is_named_with_its_options(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("lorary.recipes.serve.run_serve", lambda *_, **given: served.append(given["upstream"]))
    monkeypatch.setenv("BEHIND", "secret")
    assert run("serve", tmp_path).code == 0
    url = "http://127.0.0.1:8001/v1"
    options = ("--upstream-token", "BEHIND", "--upstream-load", "--strict")
    assert run("serve", tmp_path, "--upstream", url, *options).code == 0
    assert served == [None, UpstreamSettings(url=url, token="secret", load=True, strict=True)]
    for wrong, said in (
        (["--upstream-load"], "--upstream-load goes with --upstream URL"),
        (["--upstream", url, "--upstream-token", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
        (["--upstream", "8001"], "must be the address of a server"),
        (["--upstream", url, "--upstream-kind", "tgi"], "--upstream-kind must be"),
        (["--upstream", url, "--upstream-retries", 99], "--upstream-retries must be"),
    ):
        refused = run("serve", tmp_path, *wrong)
        assert (refused.code, said in refused.err) == (2, True), refused.err
