"""Verify names every damage that a library can take."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorary.adapter import Adapter
from lorary.library.store import Library

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(library: Library, make_adapter: Callable[..., Adapter]) -> Path:
    """The folder of adapter x in a library of x and y."""
    library.add_adapter(make_adapter("x"), {})
    library.add_adapter(make_adapter("y"), {})
    assert library.verify() == []
    return library.path / "adapters" / "x"


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "adapter_model.safetensors").write_bytes(data)


def truncate(folder: Path) -> None:
    data = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(data[:-1])


def not_a_number(folder: Path) -> None:
    tensors = safetensors.torch.load((folder / "adapter_model.safetensors").read_bytes())
    tensors[KEY] = torch.full_like(tensors[KEY], float("nan"))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder: Path) -> None:
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace('"lora_alpha": 4', '"lora_alpha": 5'))


def lose_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def lose_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def lose_provenance(folder: Path) -> None:
    (folder / "provenance.json").unlink()


def damage_provenance(folder: Path) -> None:
    (folder / "provenance.json").write_text("{")


def edit_provenance(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps({**document, **changes}))


def no_tasks(folder: Path) -> None:
    edit_provenance(folder, tasks=None)


def other_rank(folder: Path) -> None:
    edit_provenance(folder, rank=3)


def other_base(folder: Path) -> None:
    edit_provenance(folder, base={"name": "other", "fingerprint": "0" * 64})


def stray_file(folder: Path) -> None:
    (folder / "README.md").touch()


@pytest.mark.parametrize(
    ("damage", "rules"),
    [
        (flip_a_byte, ["sha256 of adapter_model.safetensors", "content hash"]),
        (truncate, ["sha256 of adapter_model.safetensors", "whole safetensors file"]),
        (not_a_number, ["sha256 of adapter_model.safetensors", "finite weights"]),
        (edit_config, ["sha256 of adapter_config.json", "content hash"]),
        (lose_weights, ["must be a folder with"]),
        (lose_config, ["must be a folder with"]),
        (lose_provenance, ["provenance.json must be readable"]),
        (damage_provenance, ["provenance.json must hold one JSON object"]),
        (no_tasks, ["must give tasks as a list"]),
        (other_rank, ["must have the rank"]),
        (other_base, ["fingerprint of the base model"]),
        (stray_file, ["must hold adapter_config.json"]),
    ],
)
def test_each_damage_is_named_and_no_other(
    library: Library, folder: Path, damage: Callable[[Path], None], rules: list[str]
) -> None:
    damage(folder)
    problems = library.verify()
    assert [problem.adapter for problem in problems] == ["x"] * len(rules)
    for problem, rule in zip(problems, rules, strict=True):
        assert rule in problem.rule
        assert problem.remedy
    assert all(set(asdict(problem)) == {"adapter", "rule", "found", "remedy"} for problem in problems)


def test_an_adapter_of_other_shapes_is_named(library: Library, folder: Path, tiny_model: Callable[..., Any]) -> None:
    other = Library.create(library.path.parent / "other", tiny_model(hidden_size=64))
    shutil.copytree(folder.parent, other.path / "adapters")
    rules = [problem.rule for problem in other.verify() if problem.adapter == "x"]
    assert len(rules) == 2
    assert "fingerprint of the base model" in rules[0]
    assert "must fit the base model" in rules[1]


def test_stray_entries_beside_the_adapters_are_named(library: Library, folder: Path) -> None:
    (folder.parent / "notes.txt").touch()
    (folder.parent / ".hidden").mkdir()
    (folder.parent / "half").mkdir()
    shutil.copytree(folder, folder.parent / "X")
    found = {problem.adapter: problem.rule for problem in library.verify()}
    assert set(found) == {"notes.txt", ".hidden", "half", "x"}
    assert "differ in more than upper and lower case" in found["x"]
    assert library.names() == ["X", "half", "x", "y"]


def test_verifying_changes_nothing(library: Library, folder: Path) -> None:
    staged = library.path / ".staging" / "new" / "z"
    staged.mkdir(parents=True)
    assert library.verify() == []
    assert staged.exists()
