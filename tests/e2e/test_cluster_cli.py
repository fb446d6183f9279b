"""`lorary cluster`, run as a user runs it, over a tiny base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run

from lorary.library.store import Library


@pytest.fixture
def library(
    tmp_path: Path, tiny_base_folder: Path, tiny_model: Any, random_adapter: Any, generator: torch.Generator
) -> Path:
    """A library of imported adapters, which nothing is known of but their weights: three directions, two of each."""
    from tests.support.adapters import write_adapter

    from lorary.adapter import Adapter, LoraFactors

    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for i in range(3):
        first = random_adapter(tiny_model(), f"task{i}_first", generator)
        second = {
            path: LoraFactors(own.lora_a, own.lora_b + 0.1 * own.lora_b.flip(0), own.scaling) for path, own in first
        }
        for adapter in (first, Adapter(f"task{i}_second", second, first.config)):
            write_adapter(adapter, tmp_path / adapter.name)
            library.add(tmp_path / adapter.name)
    return library.path


def test_an_imported_library_is_clustered_printed_stored_and_drawn(library: Path, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "map.html"
    first = run("cluster", library, "--k", 3, "--report", page)
    assert first.code == 0, first.err
    assert "3 clusters of 6 adapters" in first.out
    assert "task0_first, task0_second" in first.out
    assert "stored in" in first.out
    assert f"report: {page}" in first.out
    assert "</html>" in page.read_text()
    assert "answered from" in run("cluster", library, "--k", 3).out
    assert run("library", "verify", library).code == 0


def test_json_prints_the_document_and_nothing_else(library: Path, run: Run) -> None:
    outcome = run("cluster", library, "--k", 3, "--json")
    document = json.loads(outcome.out)
    assert set(document) >= {"k", "assignments", "cohesion", "silhouette"}
    assert document["assignments"] == {f"task{i}_{which}": i for i in range(3) for which in ("first", "second")}
    again = json.loads(run("cluster", library, "--k", "auto", "--json").out)
    assert (again["k"], again["is_chosen"]) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "code", "found"),
    [
        (("--k", "seven"), 2, "found: seven"),
        (("--k", "7"), 2, "found: 7"),
        (("--k", "0"), 2, "found: 0"),
        (("--method", "guess"), 2, "found: guess"),
        (("--report", "no/such/folder/map.html"), 2, "found: no such folder"),
    ],
)
def test_wrong_usage_is_told_in_three_lines(
    library: Path, run: Run, arguments: tuple[str, str], code: int, found: str
) -> None:
    outcome = run("cluster", library, *arguments)
    lines = [line for line in outcome.err.splitlines() if not line.startswith("reading adapters")]
    assert (outcome.code, outcome.out) == (code, "")
    assert len(lines) <= 3
    assert found in outcome.err
    assert not (library / "derived").exists()


def test_a_library_that_is_missing_or_nearly_empty_is_refused(tmp_path: Path, library: Path, run: Run) -> None:
    assert run("cluster", tmp_path / "nothing").code == 1
    for name in Library.open(library).names()[1:]:
        run("library", "remove", library, name)
    outcome = run("cluster", library)
    assert outcome.code == 1
    assert "at least two adapters" in outcome.err
    assert "remedy: add some with `lorary library add" in outcome.err
