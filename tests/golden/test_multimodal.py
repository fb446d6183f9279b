"""Multimodal models: their language model alone is adapted and routed, with PEFT as the judge of old and new paths."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorary.errors import AdapterError, BaseModelError, UsageError
from lorary.library.fingerprint import Fingerprint, fingerprint_of_model
from lorary.library.store import Library
from lorary.lora.targets import find_targets, num_layers
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base, load_base
from lorary.model.live import add_expert, replace_expert
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.model.verdict import check_computes, context_of

peft = pytest.importorskip("peft")

TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 0,
}  # fmt: skip
MROPE = {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
SEEN = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4}  # fmt: skip
QWEN = {"image_token_id": 295, "video_token_id": 294, "vision_start_token_id": 293, "vision_end_token_id": 292}
# By class of configuration: its text and vision parts and further fields; where its language model lies and lay.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, str]] = {
    "Gemma3Config": (
        {**TEXT, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        {**SEEN, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_index": 295, "boi_token_index": 294, "eoi_token_index": 293},
        "model.language_model.", "language_model.model.",
    ),
    "LlavaConfig": (
        {**TEXT, "model_type": "llama"}, {**SEEN, "model_type": "clip_vision_model", "projection_dim": 16},
        {"image_token_index": 295}, "model.language_model.", "language_model.model.",
    ),
    "Mistral3Config": (
        {**TEXT, "model_type": "mistral"}, {**SEEN, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": 295}, "model.language_model.", "language_model.model.",
    ),
    "Qwen2VLConfig": (
        MROPE, {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}, QWEN,
        "model.language_model.", "model.",
    ),
    "Qwen2_5_VLConfig": (
        MROPE, {"depth": 3, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24}, QWEN,
        "model.language_model.", "model.",
    ),
    "Idefics3Config": (
        {**TEXT, "model_type": "llama"}, SEEN, {"image_token_id": 295}, "model.text_model.", "model.text_model.",
    ),
}  # fmt: skip
IDS = torch.randint(3, 290, (2, 7), generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-4


def make_model(family: str) -> Any:
    text, vision, more, _, _ = FAMILIES[family]
    config = getattr(transformers, family)(text_config=text, vision_config=vision, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, **inputs).logits
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def peft_adapter(model: Any, folder: Path, targets: Any, seed: int = 1) -> Tensor:
    """An adapter that PEFT wrote, and what it computes with it."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(folder)
    return logits(theirs)


def renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of an adapter whose tensors have other names, those without one left out."""
    target.mkdir()
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    kept = {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}
    save_file(kept, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def is_equal(found: Tensor, expected: Tensor, bare: Tensor) -> bool:
    effect = float((expected - bare).abs().max())
    assert effect > 0.1
    return float((found - expected).abs().max()) < TOLERANCE * effect


def test_the_language_model_alone_is_adapted_and_counted(family: str) -> None:
    model, language = make_model(family), FAMILIES[family][3]
    found = find_targets(model, ["all-linear"])
    assert all(path.startswith(f"{language}layers.") for path in found)
    assert {path.rsplit(".", 1)[-1] for path in found} >= {"q_proj", "v_proj", "o_proj", "down_proj"}
    assert num_layers(model) == 2
    assert list(find_targets(model, ["q_proj"])) == [f"{language}layers.{i}.self_attn.q_proj" for i in (0, 1)]
    with pytest.raises(UsageError, match="every target module must name linear layers"):
        find_targets(model, ["q_proj", "fc1"])
    assert context_of(model) == 64


def test_a_prefix_that_attends_both_ways_is_refused() -> None:
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={**SEEN, "model_type": "siglip_vision_model", "projection_dim": 32},
        image_token_index=295,
        projection_dim=32,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(BaseModelError, match="must be causal"):
        check_computes(model, "tiny")


def test_adapters_of_old_and_new_paths_compute_what_peft_does(family: str, tmp_path: Path) -> None:
    model, (_, _, _, new, old) = make_model(family), FAMILIES[family]
    pattern = rf"{new.replace('.', '[.]')}.*(q_proj|down_proj)"
    expected, bare = peft_adapter(model, tmp_path / "new", pattern), logits(model)
    renamed(tmp_path / "new", tmp_path / "old", lambda name: name.replace(f".{new}", f".{old}"))
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    (tmp_path / "old" / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["q_proj", "down_proj"]})
    )
    library = Library.create(tmp_path / "library", model, base_name="tiny")
    for name in ("new", "old"):
        library.add(tmp_path / name)
    assert library.shapes("old") == library.shapes("new")
    assert library.verify() == []
    attach(model, library, router="arrow", top_k=1)
    for name in ("new", "old"):
        with routing(model, {"experts": [name]}):
            assert is_equal(logits(model), expected, bare)
    add_expert(model, tmp_path / "old", "live")
    replace_expert(model, tmp_path / "old", "live")
    with routing(model, {"experts": ["live"]}):
        assert is_equal(logits(model), expected, bare)
    with trace(model) as traced:
        tokens = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    assert traced.stacked().shape == (4, 2, 9, 3)
    assert tokens.shape == (2, 10)
    detach(model)
    assert torch.equal(logits(model), bare)


def test_layers_that_no_text_reaches_are_left_out_and_named(tmp_path: Path) -> None:
    model = make_model("Gemma3Config")
    expected, bare = peft_adapter(model, tmp_path / "both", ["q_proj"]), logits(model)
    library = Library.create(tmp_path / "library", model, base_name="tiny")
    message = (
        "adapter 'both' adapts 3 layers outside the language model of the base model 'tiny', the first model.vision"
    )
    with pytest.warns(UserWarning, match=message):
        library.add(tmp_path / "both")
    attach(model, library, router="arrow", top_k=1)
    assert list(seating(model).layers) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    with routing(model, {"experts": ["both"]}):
        assert is_equal(logits(model), expected, bare)
    seen = renamed(tmp_path / "both", tmp_path / "seen", lambda name: name if "vision" in name else None)
    with pytest.raises(AdapterError, match=r"adapter 'seen' must adapt the base's language model"):
        library.add(seen)


def test_one_layer_under_two_paths_is_refused(tmp_path: Path) -> None:
    model = make_model("Gemma3Config")
    peft_adapter(model, tmp_path / "new", r"model[.]language_model.*q_proj")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for name in [name for name in tensors if "layers.0" in name]:
        tensors[name.replace("model.language_model.", "language_model.model.", 1)] = tensors[name].clone()
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    (tmp_path / "new" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    save_file(tensors, tmp_path / "new" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="must have one pair of factors for a layer"):
        Library.create(tmp_path / "library", model, base_name="tiny").add(tmp_path / "new")


def test_the_place_of_the_language_model_is_part_of_the_fingerprint(family: str) -> None:
    found = fingerprint_of_model(make_model(family))
    assert found.language == (FAMILIES[family][3].removesuffix("."), "lm_head")
    assert Fingerprint.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.fixture
def gemma(tmp_path: Path, tiny_tokenizer: Any) -> Base:
    """Gemma 3 with vision as a folder, loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_model("Gemma3Config").save_pretrained(tmp_path / "gemma")
    tiny_tokenizer.save_pretrained(tmp_path / "gemma")
    return load_base(tmp_path / "gemma")


def test_a_folder_is_loaded_trained_and_routed(gemma: Base, tmp_path: Path) -> None:
    from lorary.library.fingerprint_folder import fingerprint_of_folder

    assert type(gemma.model).__name__ == "Gemma3ForConditionalGeneration"
    assert gemma.most_tokens(1000) == 64
    assert fingerprint_of_folder(gemma.files.path) == fingerprint_of_model(gemma.model)
    assert torch.equal(logits(gemma.model), logits(make_model("Gemma3Config")))
