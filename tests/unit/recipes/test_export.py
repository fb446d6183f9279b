"""`lorary export`, from the command to the folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.errors import RouterError, UsageError
from lorary.library.store import Library
from lorary.recipes.export import run_export
from lorary.serve.routed_folder import read_routed_folder

Make = Callable[..., Any]


@pytest.fixture
def library(tiny_model: Make, random_adapter: Make, generator: torch.Generator, tmp_path: Path) -> Library:
    model = tiny_model()
    made = Library.create(tmp_path / "lib", model, base_name="tiny")
    for name in ("a", "b", "c"):
        made.add_adapter(random_adapter(model, name, generator), {"tasks": [name]})
    return made


def test_the_command_says_where_the_adapter_lies_and_how_it_is_served(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorary.cli.app import app

    arguments = [
        "export",
        str(library.path),
        str(tmp_path / "out"),
        "--for",
        "vllm",
        "--router",
        "arrow",
        "--top-k",
        "2",
    ]
    app([*arguments, "--json"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    layout = read_routed_folder(result["adapter"])
    assert layout is not None
    assert (layout.router, layout.top_k, layout.experts) == ("arrow", 2, ("a", "b", "c"))
    assert (result["rank"], result["max_lora_rank"]) == (12, 16)
    app([*arguments, "--route", 'allow=["a","c"]'], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "2 experts routed by arrow, rank 8" in shown
    assert "--enable-lora --max-lora-rank 8 --lora-modules routed=" in shown


def test_a_library_that_decides_per_request_needs_another_router(library: Library, tmp_path: Path) -> None:
    library.set_default_router({"router": "contrast", "top_k": 1, "temperature": 1.0, "mix": "outputs"})
    with pytest.raises(RouterError, match="lorary serve --upstream"):
        run_export(str(library.path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert run_export(str(library.path), str(tmp_path / "out"), router="norm").router == "norm"


def test_there_is_no_export_for_other_engines(library: Library, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--for"):
        run_export(str(library.path), str(tmp_path / "out"), engine="sglang", router="arrow")
