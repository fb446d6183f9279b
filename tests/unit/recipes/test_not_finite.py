"""A base model with a weight that is no number: every command refuses it by the layer, and nothing is left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.build.settings import BuildSettings, BuildSource
from lorary.errors import BaseModelError
from lorary.evaluate.prompts import Prompt
from lorary.evaluate.sampling import Sampling
from lorary.formats.quiet import quiet_transformers
from lorary.library.store import Library
from lorary.recipes.build import run_build
from lorary.recipes.generate import run_generate
from lorary.recipes.prepare import run_prepare

WORDS = r"layer 'model\.layers\.1\.self_attn\.q_proj' must give finite numbers\nfound: NaN or infinity in the weights"


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    rows = [
        {"task": "a", "split": split, "source": f"a {i}:", "target": "up"}
        for split in ("train", "val", "test")
        for i in range(2)
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def library(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, random_adapter: Any, generator: Any
) -> Library:
    """Over a base whose NaN attention on the CPU turns into finite numbers; its expert adapts another layer."""
    model = tiny_model(num_hidden_layers=6)  # routers that read prompts early read the second layer, too
    adapter = random_adapter(model, "a", generator)
    model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with quiet_transformers():
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
    made = Library.create(tmp_path / "lib", str(tmp_path / "base"))
    made.add_adapter(adapter, {"tasks": ["a"]})
    return made


@pytest.mark.parametrize(
    "more", [{}, {"sampling": Sampling()}, {"router": "base"}, {"experts": ["a"]}, {"stream": True}]
)
def test_nothing_is_generated(library: Library, more: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BaseModelError, match=WORDS):
        run_generate(str(library.path), "a 1:", max_new_tokens=4, **more)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("answer", [None, "up"])
def test_nothing_is_explained(library: Library, answer: str | None) -> None:
    with pytest.raises(BaseModelError, match=WORDS):
        lorary.explain(str(library.path), [Prompt("a 1:", answer)], max_new_tokens=2)


def test_no_cell_gets_a_score(library: Library, tasks: str) -> None:
    evaluation = lorary.evaluate(str(library.path), tasks, routers=["arrow", "oracle"], rows=1, routing_rows=0)
    assert not evaluation.cells
    assert {failure.rule for failure in evaluation.failures} == {WORDS.split(r"\n")[0].replace("\\", "")}


@pytest.mark.parametrize("router", ["centroid", "phatgoose", "norm", "retrieval", "task-predictor", "contrast"])
def test_nothing_is_prepared(library: Library, tasks: str, router: str) -> None:
    with pytest.raises(BaseModelError, match=WORDS):
        run_prepare(str(library.path), router, tasks=tasks, steps=1)
    assert not list(library.path.glob("derived/*"))


def test_no_expert_is_built(library: Library, tasks: str, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=WORDS):
        run_build(
            tasks, str(tmp_path / "new"), source=BuildSource(str(tmp_path / "base")), settings=BuildSettings(steps=1)
        )
    assert not list((tmp_path / "new").glob("adapters/*"))
