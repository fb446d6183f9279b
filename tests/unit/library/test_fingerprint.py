"""The fingerprint: one and the same from a folder and from a live model, and it tells relatives from strangers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from checkpoints import save, save_renamed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lorary.errors import BaseModelError
from lorary.library import fingerprint_folder
from lorary.library.base import check_same_base, record_of
from lorary.library.fingerprint import Fingerprint, compare, fingerprint_of_model, sampled_positions
from lorary.library.fingerprint_folder import fingerprint_of_folder
from lorary.library.layers import LayerShapes
from lorary.lora.seat import CHILD

MakeModel = Callable[..., Any]


@pytest.fixture
def never_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint must not cost a whole model."""

    def refuse(folder: Path) -> nn.Module:
        raise AssertionError(f"{folder} was loaded")

    monkeypatch.setattr(fingerprint_folder, "loaded_model", refuse)


def gpt2() -> Any:
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0))


@pytest.mark.usefixtures("never_load")
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}])
def test_folder_and_live_model_give_one_fingerprint(
    tmp_path: Path, tiny_model: MakeModel, changes: dict[str, Any]
) -> None:
    model = tiny_model(**changes)
    found = fingerprint_of_folder(save(model, tmp_path))
    assert found == fingerprint_of_model(model)
    assert found.architecture == "LlamaForCausalLM"
    assert found.dtype == ("bfloat16" if "dtype" in changes else "float32")
    assert len(found.samples) == 8
    assert {len(entries) for entries in found.samples.values()} == {32}


@pytest.mark.usefixtures("never_load")
def test_transposed_layers_are_seen_as_linear(tmp_path: Path) -> None:
    model = gpt2()
    found = fingerprint_of_folder(save(model, tmp_path))
    assert found == fingerprint_of_model(model)
    assert found.layers.shape("transformer.h.1.attn.c_attn") == (16, 48)
    assert found.layers.shape("lm_head") == (16, 50)
    assert found.layers.shape("transformer.wte") is None


@pytest.mark.usefixtures("never_load")
def test_a_sharded_checkpoint_gives_the_same_fingerprint(tmp_path: Path, tiny_model: MakeModel) -> None:
    folder = save(tiny_model(), tmp_path, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert fingerprint_of_folder(folder) == fingerprint_of_model(tiny_model())


@pytest.mark.usefixtures("never_load")
def test_a_checkpoint_of_the_headless_model_gives_the_same_fingerprint(tmp_path: Path) -> None:
    model = gpt2()
    save(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    headless = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(headless, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_of_folder(tmp_path) == fingerprint_of_model(model)


def test_a_checkpoint_with_names_of_its_own_is_loaded_instead(
    tmp_path: Path, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_renamed(tiny_model(), tmp_path)
    monkeypatch.setattr(fingerprint_folder, "loaded_model", lambda folder: tiny_model())
    assert fingerprint_of_folder(tmp_path) == fingerprint_of_model(tiny_model())


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, tiny_model: MakeModel) -> None:
    save(tiny_model(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="the checkpoint lacks"):
        fingerprint_of_folder(tmp_path)


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "of_tomorrow"}', '{"model_type": "t5"}'])
def test_a_folder_that_holds_no_causal_language_model_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BaseModelError, match="transformers directory of a causal language model"):
        fingerprint_of_folder(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    document = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(BaseModelError):
        fingerprint_of_folder(tmp_path)


def test_a_fingerprint_survives_json(tiny_model: MakeModel) -> None:
    fingerprint = fingerprint_of_model(tiny_model())
    assert Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json()))) == fingerprint


def test_the_fingerprint_of_a_deep_model_is_small(tiny_model: MakeModel) -> None:
    document = fingerprint_of_model(tiny_model(num_hidden_layers=40)).to_json()
    assert document["layers"]["model.layers.*.self_attn.q_proj"] == {
        "count": 40, "d_in": 32, "d_out": 32, "numbers": ["0-39"],
    }  # fmt: skip
    assert len(json.dumps(document)) < 10_000


def test_a_model_that_peft_wrapped_gives_the_fingerprint_of_its_base(tiny_model: MakeModel) -> None:
    bare = fingerprint_of_model(tiny_model())
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    wrapped = peft.get_peft_model(tiny_model(), settings)
    assert fingerprint_of_model(wrapped) == bare
    assert fingerprint_of_model(wrapped.get_base_model()) == bare


def test_a_model_with_seated_experts_gives_the_fingerprint_of_its_base(tiny_model: MakeModel) -> None:
    model = tiny_model()
    bare = fingerprint_of_model(model)
    model.model.layers[0].self_attn.q_proj.add_module(CHILD, nn.Linear(32, 4))
    assert fingerprint_of_model(model) == bare


def test_a_cast_up_is_the_same_model(tiny_model: MakeModel) -> None:
    half = tiny_model(dtype=torch.bfloat16)
    recorded = fingerprint_of_model(half)
    found = fingerprint_of_model(half.float())
    assert compare(recorded, found) == "same"
    assert recorded.digest == found.digest


def noisy(model: Any, relative: float, generator: torch.Generator) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(relative * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("relative", [1e-4, 0.01, 0.3])
def test_a_fine_tuned_or_quantised_model_is_related(
    tiny_model: MakeModel, generator: torch.Generator, relative: float
) -> None:
    recorded = fingerprint_of_model(tiny_model())
    assert compare(recorded, fingerprint_of_model(noisy(tiny_model(), relative, generator))) == "related"
    assert compare(recorded, fingerprint_of_model(tiny_model(dtype=torch.float16))) == "related"


@pytest.mark.parametrize("seed", range(1, 9))
def test_other_weights_of_the_same_shapes_are_unrelated(tiny_model: MakeModel, seed: int) -> None:
    relation = compare(fingerprint_of_model(tiny_model()), fingerprint_of_model(tiny_model(seed=seed)))
    assert relation == "unrelated"


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"vocab_size": 301}, {"attention_bias": True}])
def test_other_shapes_are_different(tiny_model: MakeModel, changes: dict[str, Any]) -> None:
    assert compare(fingerprint_of_model(tiny_model()), fingerprint_of_model(tiny_model(**changes))) == "different"


def test_another_class_is_different(tiny_model: MakeModel) -> None:
    recorded = fingerprint_of_model(tiny_model())
    assert compare(recorded, fingerprint_of_model(tiny_model().model)) == "different"


class PackedLinear(nn.Linear):
    """Stands for a 4-bit layer: its weight is a packed column of bytes, its sizes those of what it multiplies."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_a_quantised_model_is_related_by_what_can_be_read(tiny_model: MakeModel) -> None:
    model = tiny_model()
    recorded = fingerprint_of_model(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
        layer.self_attn.q_proj = PackedLinear(layer.self_attn.q_proj)
    found = fingerprint_of_model(model)
    assert found.shapes == recorded.shapes
    assert 0 < len(found.samples) < len(recorded.samples)
    assert compare(recorded, found) == "related"


@given(st.integers(1, 50), st.integers(1, 50))
def test_sampled_entries_lie_in_the_matrix_with_both_ends(num_rows: int, num_columns: int) -> None:
    rows, columns = sampled_positions(num_rows, num_columns)
    flat = (rows * num_columns + columns).tolist()
    assert len(flat) == min(32, num_rows * num_columns)
    assert flat == sorted(set(flat))
    assert (flat[0], flat[-1]) == (0, num_rows * num_columns - 1)


PATHS = st.builds(
    ".".join, st.lists(st.sampled_from(["a", "b", "h", "0", "1", "2", "10", "w1"]), min_size=1, max_size=4)
)


@given(st.dictionaries(PATHS, st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=12))
def test_a_table_of_layers_says_exactly_what_was_put_in(linears: dict[str, tuple[int, int]]) -> None:
    table = LayerShapes.from_json(json.loads(json.dumps(LayerShapes.of(linears).to_json())))
    assert table == LayerShapes.of(linears)
    assert {path: table.shape(path) for path in table} == linears
    for path in ("a.7", "a.0.b", "0", "nothing"):
        assert table.shape(path) == linears.get(path)


# --- the configuration is part of what a base model is


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rms_norm_eps": 0.1}, "rms_norm_eps from 1e-06 to 0.1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, "rope_parameters.factor"),
        ({"hidden_act": "gelu"}, "hidden_act from silu to gelu"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads from 4 to 2"),
        ({"max_position_embeddings": 64}, "max_position_embeddings from 256 to 64"),
    ],
)
def test_the_same_weights_under_another_configuration_are_named_by_field(
    changes: dict[str, Any], field: str, tmp_path: Path, tiny_model: MakeModel
) -> None:
    recorded, other = record_of(tiny_model()), tiny_model(**changes)
    for found in (fingerprint_of_model(other), fingerprint_of_folder(save(other, tmp_path))):
        assert compare(recorded.fingerprint, found) == "related"
        assert found.digest == recorded.fingerprint.digest
        with pytest.warns(UserWarning, match=f"its configuration has other values .*{field}"):
            check_same_base(recorded, found, "the base", force_base=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"torch_dtype": "bfloat16", "transformers_version": "4.1.0"}, {"use_cache": False}, {"pad_token_id": 5},
        {"attention_dropout": 0.5}, {"architectures": ["LlamaModel"]}, {"eos_token_id": [0, 1]},
        {"auto_map": {"a": "b"}},
        {"initializer_range": 0.5, "output_attentions": True}, {"pretraining_tp": 2}, {"a_note": "of a later version"},
    ],
)  # fmt: skip
def test_fields_that_change_nothing_are_no_part_of_a_base(
    changes: dict[str, Any], tmp_path: Path, tiny_model: MakeModel
) -> None:
    folder = save(tiny_model(), tmp_path)
    recorded = fingerprint_of_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert compare(recorded, fingerprint_of_folder(folder)) == "same"


def test_other_spellings_and_defaults_left_out_are_the_same_configuration(
    tmp_path: Path, tiny_model: MakeModel
) -> None:
    folder = save(tiny_model(), tmp_path)
    recorded = fingerprint_of_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"], config["hidden_act"], config["attention_bias"], config["mlp_bias"]
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    assert compare(recorded, fingerprint_of_folder(folder)) == "same"
    assert recorded == fingerprint_of_folder(folder)


def test_a_number_in_single_precision_is_the_same_configuration(tiny_model: MakeModel) -> None:
    single = float(torch.tensor(1e-6, dtype=torch.float32))
    assert single != 1e-6
    assert compare(fingerprint_of_model(tiny_model()), fingerprint_of_model(tiny_model(rms_norm_eps=single))) == "same"


def test_a_fingerprint_of_an_older_lorary_knows_no_configuration_and_raises_no_alarm(tiny_model: MakeModel) -> None:
    document = fingerprint_of_model(tiny_model()).to_json()
    del document["configuration"]
    recorded = Fingerprint.from_json(document)
    assert recorded.to_json() == document
    assert compare(recorded, fingerprint_of_model(tiny_model(rms_norm_eps=0.1))) == "same"


@pytest.mark.parametrize("configuration", [7, "text", ["a"]])
def test_a_recorded_configuration_of_another_kind_is_damage(configuration: object, tiny_model: MakeModel) -> None:
    document = fingerprint_of_model(tiny_model()).to_json() | {"configuration": configuration}
    with pytest.raises((TypeError, ValueError)):
        Fingerprint.from_json(document)


@pytest.mark.parametrize("numbers", [["0-10000000000"], ["0-999", "0-999", "0-999"], [",".join(["0-999999"] * 9)]])
def test_layers_without_end_are_refused_before_they_are_counted_out(numbers: list[str]) -> None:
    pattern = ".".join(["*"] * len(numbers))
    with pytest.raises(ValueError, match=r"more than 100,000|numbers are ranges"):
        LayerShapes.from_json({pattern: {"d_in": 1, "d_out": 1, "numbers": numbers}})


def test_a_sampled_weight_that_is_no_number_is_refused_by_name(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = torch.nan
    save(model, tmp_path / "base")
    for make in (lambda: fingerprint_of_model(model), lambda: fingerprint_of_folder(tmp_path / "base")):
        with pytest.raises(
            BaseModelError, match=r"weight 'model\.embed_tokens\.weight' of the base model must be finite"
        ):
            make()
