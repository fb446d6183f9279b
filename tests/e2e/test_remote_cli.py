"""`lorary library push`, `pull` and `clone`, and commands that read a remote."""

import json
from pathlib import Path

import pytest
import torch
from commands import Run

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft_config import new_config
from lorary.library.store import Library

LAYER = "model.layers.0.self_attn.q_proj"


def adapter_of(name: str) -> Adapter:
    factors = LoraFactors(torch.ones(2, 32), torch.ones(32, 2), 2.0)
    return Adapter(name, {LAYER: factors}, new_config(None, rank=2, alpha=4, target_modules=[LAYER]))


def test_a_library_is_pushed_cloned_pulled_and_listed(
    tmp_path: Path, tiny_base_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))
    library, remote, copy = Library.create(tmp_path / "lib", tiny_base_folder), tmp_path / "remote", tmp_path / "copy"
    library.add_adapter(adapter_of("a"), {"tasks": ["t"]})
    pushed = run("library", "push", library.path, remote, "--json")
    assert pushed.code == 0, pushed.err
    assert json.loads(pushed.out)["sent"] == ["a"]
    assert pushed.err.startswith("push: reading"), "something is said before work begins"
    cloned = run("library", "clone", remote, copy)
    assert cloned.out.startswith(f"1 adapters received: {copy}, snapshot")
    library.add_adapter(adapter_of("b"), {"tasks": ["t"]})
    assert run("library", "push", library.path).out.startswith("1 adapters sent, 0 removed")
    pulled = run("library", "pull", copy, "--json")
    assert json.loads(pulled.out)["received"] == ["b"]
    listed = run("library", "ls", f"file://{remote}", "--json")
    assert [row["name"] for row in json.loads(listed.out)] == ["a", "b"]

    removed = run("library", "remove", f"file://{remote}", "a")
    assert (removed.code, "lorary library clone" in removed.err) == (1, True)
    assert run("library", "clone", remote, copy).code == 1
    refused = run("library", "push", library.path, "s3://me:hunter22@bucket/lib")
    assert (refused.code, "hunter22" in refused.err + refused.out) == (2, False)
    library.replace_adapter(adapter_of("a"), {"tasks": ["mine"]})
    Library.open(copy).replace_adapter(adapter_of("a"), {"tasks": ["theirs"]})
    assert run("library", "push", library.path).code == 0
    conflict = run("library", "pull", copy)
    assert (conflict.code, "adapter 'a'" in conflict.err) == (1, True)
    assert run("library", "pull", copy, "--overwrite").code == 0
    assert Library.open(copy).provenance("a")["tasks"] == ["mine"]
