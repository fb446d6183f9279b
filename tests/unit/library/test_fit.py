"""What an adapter from PEFT must have to enter: all its layers, and of the base nothing but what the base has."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from tests.support.adapters import write_adapter

import lorary
from lorary.errors import AdapterError
from lorary.formats.peft_config import new_config
from lorary.library.store import Library

IDS = torch.tensor([[5, 9, 17, 200, 3]])
Make = Callable[..., Any]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Make, tiny_tokenizer: Any) -> Path:
    """A folder of the tiny model, its head tied to the embedding or not."""
    tiny_model(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path, dtype: str = "float32") -> Any:
    return lorary.load_base(folder, dtype=dtype).model


def trained(base: Path, generator: torch.Generator, *, tokens: int | None = None, **settings: Any) -> Any:
    """A PEFT model over the base with random factors."""
    model = load(base)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    told = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers
        model = peft.get_peft_model(model, peft.LoraConfig(**told)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: Any, folder: Path, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves embeddings
        model.save_pretrained(str(folder), **settings)
    return folder


def keys_of(folder: Path) -> set[str]:
    return set(safetensors.torch.load_file(folder / "adapter_model.safetensors"))


@pytest.mark.filterwarnings("ignore:the base model at hand is the library's base model .*rounded to bfloat16")
@pytest.mark.parametrize(
    ("targets", "settings"),
    [(["q_proj", "lm_head"], {}), (["q_proj"], {"save_embedding_layers": True}), ("model.*q_proj|lm_head", {})],
)
def test_an_adapter_that_brings_the_bases_own_head_is_taken_and_equals_peft(
    base: Path, tmp_path: Path, generator: torch.Generator, targets: Any, settings: dict[str, Any]
) -> None:
    model = trained(base, generator, target_modules=targets)
    folder = save(model, tmp_path / "head", **settings)
    assert any("lora" not in key for key in keys_of(folder))
    library = Library.create(tmp_path / "lib", base)
    library.add(folder)
    assert library.verify() == []
    with torch.no_grad():
        expected, bare = model(input_ids=IDS).logits, load(base)(input_ids=IDS).logits
        routed = lorary.attach(load(base), library, router="arrow", top_k=1)
        found = routed(input_ids=IDS).logits
        effect = (expected - bare).abs().max()
        assert (found - expected).abs().max() < 1e-4 * effect
        seated = lorary.attach(load(base, "bfloat16"), library)
        lorary.detach(seated)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"]}])
def test_a_head_that_was_changed_is_refused_with_a_remedy(
    base: Path, tmp_path: Path, generator: torch.Generator, settings: dict[str, Any]
) -> None:
    model = trained(base, generator, **settings)
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 3] += 0.01
    folder = save(model, tmp_path / "head", save_embedding_layers=True)
    library = Library.create(tmp_path / "lib", base)
    with pytest.raises(
        AdapterError, match=r"must leave \S+weight of the base .*(?s:.)*remedy: .*save_embedding_layers"
    ):
        library.add(folder)
    assert len(library) == 0


@pytest.mark.parametrize("saved", ["auto", True, False])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_resized_vocabulary_is_named_as_such(
    base: Path, tmp_path: Path, generator: torch.Generator, saved: Any, targets: list[str]
) -> None:
    model = trained(base, generator, tokens=310, target_modules=targets)
    folder = save(model, tmp_path / "head", save_embedding_layers=saved)
    library = Library.create(tmp_path / "lib", base)
    if saved is False and targets == ["q_proj"]:
        library.add(folder)  # nothing of it depends on the vocabulary
        return
    with pytest.raises(AdapterError, match=r"vocabulary of the base model .*, 300 tokens\nfound: 310 tokens at"):
        library.add(folder)


@pytest.mark.filterwarnings("ignore:the base model at hand is related")
def test_a_copy_is_compared_with_a_base_that_is_not_on_disk_by_what_is_known_of_it(
    tmp_path: Path, tiny_model: Make, base: Path, generator: torch.Generator
) -> None:
    folder = save(trained(base, generator), tmp_path / "head")
    library = Library.create(tmp_path / "lib", load(base), base_name="elsewhere")
    with pytest.warns(UserWarning, match=r"compared when it is attached"):
        library.add(folder)
    lorary.detach(lorary.attach(load(base), library))
    with torch.no_grad():
        other = load(base)
        other.lm_head.weight[200:] *= 1.5
    with pytest.raises(AdapterError, match=r"must leave lm_head\.weight"):
        lorary.attach(other, library, force_base=True)


def test_a_seated_model_takes_an_adapter_of_the_head_and_refuses_a_changed_one(
    base: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    library = Library.create(tmp_path / "lib", base)
    library.add(save(trained(base, generator, target_modules=["q_proj"]), tmp_path / "one"))
    routed = lorary.attach(load(base), library)
    model = trained(base, generator)
    assert lorary.add_expert(routed, save(model, tmp_path / "two")) == "two"
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 3] += 0.01
    with pytest.raises(AdapterError, match=r"must leave lm_head\.weight"):
        lorary.add_expert(routed, save(model, tmp_path / "three"))


def test_a_saved_module_stays_refused_by_its_field(base: Path, tmp_path: Path, generator: torch.Generator) -> None:
    model = trained(base, generator, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match="but modules_to_save is set"):
        Library.create(tmp_path / "lib", base).add(save(model, tmp_path / "head"))


# Layers that are targeted and absent.


def drop(folder: Path, unwanted: Callable[[str], bool]) -> Path:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key: tensor for key, tensor in tensors.items() if not unwanted(key)}, file)
    return folder


@pytest.mark.parametrize(
    ("targets", "part", "layer"),
    [
        (["q_proj"], "layers.1.", "model.layers.1.self_attn.q_proj"),
        (["q_proj", "up_proj"], "up_proj", "model.layers.0.mlp.up_proj and 1 more"),
        (r".*\.(q_proj|down_proj)", "layers.0.mlp", "model.layers.0.mlp.down_proj"),
        (["model.layers.0.self_attn.q_proj", "k_proj"], "q_proj", "model.layers.0.self_attn.q_proj"),
        ("all-linear", "layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
        (["q_proj", "lm_head"], "lm_head", "lm_head"),
    ],
)
def test_a_targeted_layer_without_factors_is_refused_and_verify_finds_it(
    base: Path, tmp_path: Path, generator: torch.Generator, targets: Any, part: str, layer: str
) -> None:
    folder = save(trained(base, generator, target_modules=targets), tmp_path / "a", save_embedding_layers=False)
    library = Library.create(tmp_path / "lib", base)
    library.add(folder, "whole")
    drop(folder, lambda key: part in key)
    with pytest.raises(
        AdapterError, match=rf"adapter 'a' must hold factors for each layer .*\nfound: none for {layer};"
    ):
        library.add(folder)
    drop(library.path / "adapters" / "whole", lambda key: part in key)
    assert any("must hold factors for each layer" in problem.rule for problem in library.verify())
    routed = lorary.attach(load(base), _library_of_one(tmp_path, base, generator))
    with pytest.raises(AdapterError, match="must hold factors for each layer"):
        lorary.add_expert(routed, folder)


def test_a_missing_block_is_noticed_where_peft_chose_the_layers(
    base: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    folder = save(trained(base, generator, target_modules=["q_proj", "v_proj"]), tmp_path / "a")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": None}))
    library = Library.create(tmp_path / "lib", base)
    library.add(folder, "whole")
    drop(folder, lambda key: "layers.1." in key)
    with pytest.raises(AdapterError, match=r"none for model\.layers\.1\.self_attn\.q_proj and 1 more"):
        library.add(folder)


def _library_of_one(tmp_path: Path, base: Path, generator: torch.Generator) -> Library:
    library = Library.create(tmp_path / "other", base)
    library.add(save(trained(base, generator, target_modules=["v_proj"]), tmp_path / "v"))
    return library


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "c_attn", "no_such_layer"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1.*(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1": 8}},
        {"target_modules": None},
    ],
)
def test_what_peft_saves_for_some_layers_is_whole(
    base: Path, tmp_path: Path, generator: torch.Generator, settings: dict[str, Any]
) -> None:
    folder = save(trained(base, generator, **settings), tmp_path / "a")
    library = Library.create(tmp_path / "lib", base)
    library.add(folder)
    assert library.verify() == []


def test_a_path_with_a_part_too_few_or_too_many_is_pointed_to(
    base: Path, tmp_path: Path, generator: torch.Generator
) -> None:
    folder = save(trained(base, generator, target_modules=["q_proj"]), tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    whole = safetensors.torch.load_file(file)
    library = Library.create(tmp_path / "lib", base)
    for put in ("", "model.model."):
        safetensors.torch.save_file(
            {key.replace(".model.model.", f".model.{put}", 1): t for key, t in whole.items()}, file
        )
        with pytest.raises(AdapterError, match=r"no linear layer there, but one at model\.layers\.0"):
            library.add(folder)


@pytest.mark.parametrize("number", ["00", "+1", " 0", "\u0661", "9" * 5000, "0_0"])
def test_a_layer_number_that_no_model_writes_is_refused_at_add(
    base: Path, tmp_path: Path, generator: torch.Generator, number: str
) -> None:
    folder = save(trained(base, generator, target_modules=["q_proj"]), tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({key.replace("layers.0.", f"layers.{number}."): t for key, t in tensors.items()}, file)
    with pytest.raises(AdapterError, match=r"the base has no linear layer there|longer than 1000") as caught:
        Library.create(tmp_path / "lib", base).add(folder)
    assert len(str(caught.value)) < 1000


def test_experts_that_are_no_layers_here_are_explained(base: Path, tmp_path: Path) -> None:
    path = "model.layers.0.mlp.experts.0.up_proj"
    factors = lorary.adapter.LoraFactors(torch.ones(2, 32), torch.ones(48, 2), 2.0)
    told = new_config(None, rank=2, alpha=4, target_modules=["up_proj"])
    write_adapter(lorary.adapter.Adapter("a", {path: factors}, told), tmp_path / "a")
    with pytest.raises(AdapterError, match="experts may be bare parameters"):
        Library.create(tmp_path / "lib", base).add(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
