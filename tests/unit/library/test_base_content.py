"""The hash by which results are kept: one from folder and live model, another where the base computes otherwise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save, save_renamed
from torch import nn

from lorary.library import base_content
from lorary.library.base_content import content_of_folder, content_of_model
from lorary.library.fingerprint import fingerprint_of_model
from lorary.lora.seat import CHILD

MakeModel = Callable[..., Any]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}])
@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}])
def test_folder_and_live_model_give_one_hash_and_nothing_is_loaded(
    tmp_path: Path, tiny_model: MakeModel, changes: dict[str, Any], settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(folder: Path) -> nn.Module:
        raise AssertionError(f"{folder} was loaded")

    monkeypatch.setattr(base_content, "loaded_model", refuse)
    model = tiny_model(**changes)
    assert content_of_folder(save(model, tmp_path, **settings)) == content_of_model(model)


def test_a_checkpoint_with_names_of_its_own_is_loaded_instead(
    tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_renamed(tiny_model(), tmp_path)
    monkeypatch.setattr(base_content, "loaded_model", lambda folder: tiny_model())
    assert content_of_folder(tmp_path) == content_of_model(tiny_model())


def test_whatever_the_base_computes_with_is_in_the_hash(tiny_model: MakeModel) -> None:
    bare = tiny_model()
    found = {content_of_model(bare)}
    for name, parameter in bare.named_parameters():
        with torch.no_grad():
            parameter += 1.0
            assert content_of_model(bare) not in found, name
        found.add(content_of_model(bare))
    # What eight matrices do not tell: norms and the configuration.
    turned = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 10.0})
    assert fingerprint_of_model(turned).digest == fingerprint_of_model(tiny_model()).digest
    assert content_of_model(turned) != content_of_model(tiny_model())


def test_what_is_seated_and_how_the_model_is_run_are_not(tiny_model: MakeModel) -> None:
    model = tiny_model()
    bare = content_of_model(model)
    model.config.use_cache = not model.config.use_cache
    model.model.layers[0].self_attn.q_proj.add_module(CHILD, nn.Linear(2, 2))
    assert content_of_model(model) == bare
    assert content_of_model(model.double()) == bare


def test_weights_that_are_elsewhere_are_passed_over(tiny_model: MakeModel) -> None:
    model = tiny_model()
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.to("meta"))
    assert content_of_model(model) != content_of_model(tiny_model())
