"""`lorary explain`, run as a user runs it, over a tiny base model."""

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
    """Three experts over the tiny base."""
    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in "abc":
        library.add_adapter(random_adapter(tiny_model(), name, generator), {"tasks": [name]})
    return library.path


def test_a_prompt_is_explained_in_text_and_on_a_page(library: Path, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "page.html"
    outcome = run("explain", library, "--prompt", "Name the colour:", "--against", "norm", "--report", page)
    assert outcome.code == 0, outcome.err
    for said in ("answer (made", "without a", "agreement with norm", "experts, where each may be chosen"):
        assert said in outcome.out
    assert f"report: {page}" in outcome.out
    assert "Where the tokens went" in page.read_text()


def test_json_prints_one_document_for_several_prompts(library: Path, tmp_path: Path, run: Run) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Name the colour:", "answer": "blue"}\n{"prompt": "Add one:", "answer": "two"}\n')
    outcome = run(
        "explain",
        library,
        "--prompts",
        prompts,
        "--router",
        "projection",
        "--route",
        "top_p=0.9",
        "--without",
        "b",
        "--json",
    )
    document = json.loads(outcome.out)
    assert (document["router"], len(document["prompts"])) == ("projection", 2)
    assert document["settings"]["top_p"] == 0.9
    assert [one["name"] for one in document["without"]] == ["b"]
    assert [expert["name"] for expert in document["experts"]] == ["a", "b", "c"]
    base = json.loads(run("explain", library, "--prompts", prompts, "--router", "base", "--json").out)
    assert (base["decides"], base["fixed"]) == (False, {})
    assert base["answers"]["log_likelihood"] == pytest.approx(
        document["answers"]["base"]["log_likelihood"][0] + document["answers"]["base"]["log_likelihood"][1]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one of them\nfound: none"),
        (("--prompt", "a", "--prompts", "b"), "one of them\nfound: both"),
        (("--prompts", "b", "--answer", "c"), "--answer goes with --prompt"),
        (("--prompts", "none.jsonl"), "the prompts file must exist"),
        (("--prompt", ""), "--prompt must hold text"),
        (("--prompt", "a", "--without", "z"), "found: ['z']"),
        (("--prompt", "a", "--report", "no/such/folder/page.html"), "found: no such folder"),
    ],
)
def test_wrong_usage_is_told_in_three_lines(library: Path, run: Run, arguments: tuple[str, ...], said: str) -> None:
    outcome = run("explain", library, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert said in outcome.err
    assert len(outcome.err.splitlines()) <= 3
