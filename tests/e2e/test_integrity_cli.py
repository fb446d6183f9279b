"""`lorary library snapshot`, `snapshots`, `rollback` and `repair` on the command line."""

import json
from pathlib import Path

import torch
from commands import Run

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft_config import new_config
from lorary.library.store import Library

LAYER = "model.layers.0.self_attn.q_proj"


def adapter_of(name: str) -> Adapter:
    factors = LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 2.0)
    return Adapter(name, {LAYER: factors}, new_config(None, rank=2, alpha=4, target_modules=[LAYER]))


def test_a_library_is_kept_rolled_back_and_repaired(tmp_path: Path, tiny_base_folder: Path, run: Run) -> None:
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    library.add_adapter(adapter_of("a"), {"tasks": ["t"]})
    made = run("library", "snapshot", library.path, "--name", "s", "--json")
    assert (made.code, json.loads(made.out)["adapters"]) == (0, ["a"])
    library.remove("a")
    back = run("library", "rollback", library.path, "s")
    assert back.out.splitlines() == [
        f"{library.path} is as in snapshot 's': 1 adapters restored, 0 removed",
        f"undo: lorary library rollback {library.path} before-rollback-1",
    ]
    assert "already" in run("library", "rollback", library.path, "s").out
    listed = run("library", "snapshots", library.path)
    assert [line.split()[0] for line in listed.out.splitlines()] == ["s", "before-rollback-1", "2"]
    removed = run("library", "snapshots", library.path, "--remove", "before-rollback-1", "--json")
    assert [each["name"] for each in json.loads(removed.out)["snapshots"]] == ["s"]
    missing = run("library", "rollback", library.path, "z")
    assert (missing.code, "none named 'z'" in missing.err) == (1, True)

    (library.path / "adapters" / "a" / "provenance.json").unlink()
    told = run("library", "repair", library.path, "--check")
    assert (told.code, "a: restored from snapshot 's'" in told.out) == (1, True)
    assert "1 of 1 would be mended, 1 problems now" in told.out
    done = run("library", "repair", library.path, "--json")
    assert (done.code, json.loads(done.out)["problems"]) == (0, [])
    assert Library.open(library.path).provenance("a")["tasks"] == ["t"]
    assert run("library", "repair", library.path).out == "0 of 0 mended, 0 problems\n"
