"""`lorary export` for peft, transformers and llama.cpp: what it writes, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import lorary
from lorary.errors import AdapterError, LibraryError, UsageError
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.model.merged import check_merged
from lorary.recipes.export import run_static_export


@pytest.fixture
def filled(library: Library, base: Base, random_adapter: Callable[..., Any], generator: torch.Generator) -> Library:
    for name, rank in (("a", 2), ("b", 3)):
        library.add_adapter(random_adapter(base.model, name, generator, rank=rank), {"tasks": [name]})
    return library


def test_a_sum_in_the_weights_gives_the_logits_of_the_routed_model(filled: Library, base: Base, tmp_path: Path) -> None:
    weights = {"a": 0.5, "b": -1.0}
    result = run_static_export(str(filled.path), str(tmp_path / "whole"), engine="transformers", weights=weights)
    assert result.difference is not None
    assert result.difference < 1e-4
    tokens = torch.arange(8)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")(tokens).logits
    bare = base.model(tokens).logits
    lorary.attach(base.model, filled, experts=weights)
    routed = base.model(tokens).logits
    lorary.detach(base.model)
    assert (merged - routed).abs().max() < 1e-4 * (routed - bare).abs().max()
    half = run_static_export(
        str(filled.path), str(tmp_path / "half"), engine="transformers", experts=("a",), weights_dtype="bfloat16"
    )
    assert half.rounding is not None
    assert half.rounding > 1e-4


def test_a_gguf_file_holds_the_update_of_every_layer(filled: Library, tmp_path: Path) -> None:
    run_static_export(str(filled.path), str(tmp_path / "a.gguf"), engine="llama.cpp", experts=("a",))
    reader = GGUFReader(str(tmp_path / "a.gguf"))
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    adapter = filled.get("a")
    for path, name in (
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.down_proj", "ffn_down"),
    ):
        factors = adapter.modules[f"model.layers.0.{path}"]
        up, down = tensors[f"blk.0.{name}.weight.lora_b"], tensors[f"blk.0.{name}.weight.lora_a"]
        update = alpha / factors.rank * up @ down
        if name == "attn_q":  # back from interleaved rows, over 4 heads
            update = update.view(4, -1, 2, update.shape[1]).transpose(1, 2).reshape(update.shape)
        assert torch.allclose(update, factors.delta(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "peft", "weights": {"a": 1.0}}, UsageError, "lorary merge LIB --method concat"),
        ({"engine": "peft", "experts": ("c",)}, LibraryError, "no adapter 'c'"),
        ({"engine": "transformers"}, UsageError, "must export one adapter"),
        ({"engine": "llama.cpp", "experts": ("a", "b")}, UsageError, "must export one adapter"),
        ({"engine": "peft", "weights_dtype": "float16"}, UsageError, "--weights-dtype needs --for transformers"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, filled: Library, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_static_export(str(filled.path), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_merged_model_that_answers_otherwise_is_refused() -> None:
    with pytest.raises(AdapterError, match="logits of the routed model"):
        check_merged("a", 0.1)
