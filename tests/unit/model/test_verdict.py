"""The verdict on a base model: what is refused, which layers are silent, how many positions count, and what is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.families import tiny_family
from torch import Tensor

from lorary.caching import cache_folder
from lorary.errors import AdapterError, BaseModelError, UsageError
from lorary.formats.quiet import quiet_transformers
from lorary.lora.targets import find_targets
from lorary.model import verdict as verdicts
from lorary.model.attach import detach, routing
from lorary.model.base import load_base
from lorary.model.live import add_expert
from lorary.model.save import load, save
from lorary.model.trace import trace
from lorary.model.trial import run_trial
from lorary.model.verdict import check_computes, context_of, settle, verdict_of

LONG_ROPE: dict[str, Any] = {
    "num_key_value_heads": 4, "original_max_position_embeddings": 8, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                        "original_max_position_embeddings": 8},
}  # fmt: skip
MIXTURE_LONG_ROPE = {
    **LONG_ROPE, "rope_parameters": {**LONG_ROPE["rope_parameters"], "short_mscale": 1.0, "long_mscale": 1.2},
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
SLIDING_AND_DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
}


@pytest.fixture(autouse=True)
def _empty_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verdicts, "_verdicts", {})
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "cache"))


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def ids_of(lengths: list[int], size: int = 96) -> tuple[Tensor, Tensor]:
    """Rows of some lengths, padded on the left, and their mask."""
    longest = max(lengths)
    rows = torch.randint(3, size, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return rows, mask


# Causality.


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"is_causal": False}),
        ("qwen3", {"is_causal": False}),
        ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 8}),
        ("bert", {"is_decoder": False}),
        ("roberta", {"is_decoder": False, "pad_token_id": 1}),
        ("electra", {"is_decoder": False}),
        ("xlnet", {}),
        ("cpmant", {}),
    ],
)
def test_a_base_that_reads_both_ways_is_refused(family: str, fields: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16) if family != "xlnet" else (torch.float32,):
        model = tiny_family(family, dtype=dtype, **fields)
        with pytest.raises(BaseModelError, match=f"base model tiny .{type(model).__name__}. must be causal"):
            check_computes(model, "tiny")


def test_a_folder_that_says_is_causal_false_is_refused_at_load(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = saved(tiny_model(), tiny_tokenizer, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    with pytest.raises(BaseModelError, match=r"must be causal(.|\n)*is_causal=False in its configuration"):
        load_base(folder)


def test_a_live_base_that_reads_both_ways_is_refused_at_attach(
    route: Callable[..., Any], random_adapter: Callable[..., Any], generator: torch.Generator
) -> None:
    model = tiny_family("llama", is_causal=False, dtype=torch.float32)
    with pytest.raises(BaseModelError, match="must be causal"):
        route(model, [random_adapter(model, "one", generator)])
    assert not any("lorary" in path for path, _ in model.named_modules())


# Rows alike.


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "bart", "marian", "whisper"])
def test_a_base_whose_rows_depend_on_padding_is_refused(family: str) -> None:
    with pytest.raises(BaseModelError, match="must give a row the same logits with padding on its left"):
        check_computes(tiny_family(family, dtype=torch.float32), "tiny")


def test_a_base_that_cannot_run_on_token_ids_alone_is_refused_at_load_and_let_pass_at_attach() -> None:
    model = tiny_family("xmod", dtype=torch.float32)
    with pytest.raises(BaseModelError, match="must run on token ids alone"):
        check_computes(model, "tiny")
    check_computes(model, "tiny", must_run=False)


def test_logits_that_are_not_finite_tell_nothing_and_are_not_kept(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(float("nan"))
    check_computes(model, "tiny")
    assert not (cache_folder() / "verdicts").exists()


def test_the_verdict_on_a_damaged_copy_is_not_taken_for_that_on_a_sound_one(tiny_model: Callable[..., Any]) -> None:
    damaged = tiny_model()
    with torch.no_grad():
        damaged.model.layers[0].input_layernorm.weight[0] = 1e30  # no sample of the fingerprint
    with pytest.raises(BaseModelError, match=r"(?s)must have weights.*1e\+30 in the weights, in .*input_layernorm"):
        check_computes(damaged, "damaged")
    check_computes(tiny_model(), "sound")


def test_a_base_whose_padded_rows_alone_are_not_finite_is_refused() -> None:
    # Its mask is the least of float64, which its softmax takes in float32.
    with pytest.raises(BaseModelError, match="finite for a row alone and not in a batch, in float64"):
        check_computes(tiny_family("bloom", dtype=torch.float64), "tiny")


def test_a_trial_leaves_the_model_and_the_random_state_as_they_were(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(num_hidden_layers=5)
    model.train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state, defaults = torch.get_rng_state(), model.generation_config
    verdict_of(model)
    assert [module.training for module in model.modules()] == before
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert len(model.model.layers) == 5
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is defaults


# Silent layers.


def bloom() -> Any:
    return tiny_family("bloom", dtype=torch.float32, slow_but_exact=True, pretraining_tp=2)


@pytest.mark.parametrize(
    ("make", "silent"),
    [
        (lambda: tiny_family("mamba", dtype=torch.float32), {"dt_proj"}),
        (lambda: tiny_family("falcon_mamba", dtype=torch.float32), {"dt_proj"}),
        (lambda: tiny_family("jamba", dtype=torch.float32), {"dt_proj"}),
        (bloom, {"dense", "dense_4h_to_h"}),
        (lambda: tiny_family("bloom", dtype=torch.float32), set()),
        (lambda: tiny_family("llama", dtype=torch.float32), set()),
    ],
)
def test_silent_layers_are_no_part_of_all_linear_and_refused_by_name(make: Callable[[], Any], silent: set[str]) -> None:
    model = make()
    dead = verdict_of(model).dead
    assert {path.rpartition(".")[2] for path in dead} == silent
    whole = find_targets(model, ["all-linear"])
    assert list(find_targets(model, ["all-linear"], silent=dead)) == [path for path in whole if path not in dead]
    for name in silent:
        with pytest.raises(
            UsageError, match=f"must reach the logits of {type(model).__name__}\nfound: .*{name}, which"
        ):
            find_targets(model, [name], silent=dead)


def test_layers_that_only_the_whole_model_shows_to_be_silent_are_found(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(num_hidden_layers=6)
    model.unused = torch.nn.Linear(4, 4)
    model.model.layers[5].self_attn.extra = torch.nn.Linear(4, 4)
    assert set(verdict_of(model).dead) == {"unused", "model.layers.5.self_attn.extra"}


def test_an_adapter_of_a_silent_layer_is_refused_at_attach_and_live(
    route: Callable[..., Any], random_adapter: Callable[..., Any], generator: torch.Generator
) -> None:
    model = tiny_family("mamba", dtype=torch.float32)
    silent = random_adapter(model, "silent", generator, targets=("x_proj", "dt_proj"))
    heard = random_adapter(model, "heard", generator, targets=("x_proj", "in_proj"))
    with pytest.raises(AdapterError, match=r"'silent' adapts layer 'backbone.layers.0.mixer.dt_proj', whose output"):
        route(model, [silent, heard])
    assert not any("lorary" in path for path, _ in model.named_modules())
    routed = route(model, [heard])
    with pytest.raises(AdapterError, match="'silent' adapts layer"):
        add_expert(routed, silent)


# Positions.


@pytest.mark.parametrize(
    ("family", "fields", "positions"),
    [
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("xlm-roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("camembert", {"max_position_embeddings": 60, "pad_token_id": 5}, 54),
        ("data2vec-text", {"max_position_embeddings": 66, "pad_token_id": 1}, 64),
        ("bert", {}, 64),
        ("opt", {}, 64),
        ("biogpt", {}, 64),
        ("gpt_neo", {}, 64),
        ("gpt2", {"n_positions": 50}, 50),
        ("ctrl", {"n_positions": 50}, 50),
        ("openai-gpt", {"n_positions": 50}, 50),
        ("mpt", {"max_seq_len": 50}, 50),
        ("xglm", {}, 64),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("phi3", LONG_ROPE, 8),
        ("llama", DYNAMIC, 16),
    ],
)
def test_the_context_is_what_a_model_can_take(family: str, fields: dict[str, Any], positions: int | None) -> None:
    model = tiny_family(family, dtype=torch.float32, **fields)
    assert context_of(model) == positions
    settle(model, verdict_of(model))
    if positions is not None:
        with torch.no_grad():
            assert model(ids_of([positions])[0]).logits.isfinite().all()


def test_a_robertas_answer_has_the_positions_of_its_loss(
    route: Callable[..., Any], random_adapter: Callable[..., Any], generator: torch.Generator
) -> None:
    model = tiny_family("roberta", dtype=torch.float32, max_position_embeddings=66, pad_token_id=1)
    bare = len(model._forward_pre_hooks)
    routed = route(model, [random_adapter(model, "one", generator, targets=("query", "dense"))])
    ids, mask = ids_of([4, 9])
    with trace(routed) as traced:  # `lm_head.dense` is given the last token alone
        found = generate(routed, ids, mask)
    assert traced.usage() == {"one": pytest.approx(1.0)}
    with pytest.raises(UsageError, match=r"found: 3 at lm_head\.dense, 11 at"):
        traced.stacked()
    for row, length in enumerate((4, 9)):
        with torch.no_grad():
            alone = routed(torch.cat([ids[row, -length:], found.sequences[row, 9:]])[None]).logits[0]
        for step, logits in enumerate(found.logits):
            torch.testing.assert_close(logits[row], alone[length - 1 + step], rtol=1e-4, atol=1e-4)
    detach(routed)
    assert len(model._forward_pre_hooks) == bare


def generate(model: Any, ids: Tensor, mask: Tensor, new: int = 3) -> Any:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("phi3", LONG_ROPE),
        ("phimoe", MIXTURE_LONG_ROPE),
        ("llama", DYNAMIC),
        ("falcon", DYNAMIC),
        ("olmo3", SLIDING_AND_DYNAMIC),
    ],
)
def test_positions_that_follow_the_length_are_used_up_to_where_they_are_fixed(
    family: str,
    fields: dict[str, Any],
    route: Callable[..., Any],
    random_adapter: Callable[..., Any],
    generator: torch.Generator,
) -> None:
    model = tiny_family(family, dtype=torch.float32, **fields)
    with torch.no_grad():
        model(ids_of([40])[0])  # an earlier text changes the frequencies
    limit = context_of(model)
    assert limit is not None
    targets = ("o_proj",) if family != "falcon" else ("dense",)
    routed = route(model, [random_adapter(model, name, generator, targets=targets) for name in ("one", "two")])
    ids, mask = ids_of([limit - 5, limit - 3])
    found = generate(routed, ids, mask)
    for row, length in enumerate((limit - 5, limit - 3)):
        alone = generate(routed, ids[row : row + 1, -length:], mask[row : row + 1, -length:])
        for left, right in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(left[row], right[0], rtol=1e-4, atol=1e-4)
    with trace(routed) as traced:
        generate(routed, ids[1:, 2:], mask[1:, 2:])
    assert traced.stacked().shape[2] == ids[1:, 2:].shape[1] + 2
    with pytest.raises(BaseModelError, match=f"must fit the {limit} positions at which the rotary frequencies"):
        generate(routed, ids, mask, new=6)
    with pytest.raises(BaseModelError, match=f"found: position {limit + 1}"), torch.no_grad():
        routed(ids_of([limit + 1])[0])
    detach(routed)
    with torch.no_grad():
        assert routed(ids_of([40])[0]).logits.isfinite().all()


def test_a_saved_routed_model_holds_no_state_of_an_earlier_text(
    route: Callable[..., Any], random_adapter: Callable[..., Any], generator: torch.Generator, tmp_path: Path,
    tiny_tokenizer: Any,
) -> None:  # fmt: skip
    model = tiny_family("llama", dtype=torch.float32, vocab_size=300, **DYNAMIC)
    ids = ids_of([16])[0]
    with torch.no_grad():
        expected = model(ids).logits
        model(ids_of([40])[0])
        routed = route(model, [random_adapter(model, "one", generator)])
        with routing(routed, "base"):
            assert torch.equal(routed(ids).logits, expected)
        folder = save(routed, tmp_path / "saved", copy_base=True)
        again = load(folder, device="cpu")
        with routing(again, "base"):
            assert torch.equal(again(ids).logits, expected)


def test_rows_of_a_base_whose_positions_follow_the_length_are_cut(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_family("phi3", dtype=torch.float32, vocab_size=300, eos_token_id=0, **LONG_ROPE)
    base = load_base(saved(model, tiny_tokenizer, tmp_path / "base"), device="cpu")
    assert base.most_tokens(1024) == 8
    with pytest.raises(BaseModelError, match="must fit the 8 positions"), torch.no_grad():
        base.model(ids_of([9])[0])


# What is kept.


def test_a_verdict_is_found_out_once(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []
    monkeypatch.setattr(verdicts, "run_trial", lambda *args: trials.append(args) or run_trial(*args))
    first = verdict_of(tiny_model())
    assert len(trials) == 1
    for memory in (verdicts._verdicts, {}):  # this process, and the next one
        monkeypatch.setattr(verdicts, "_verdicts", memory)
        assert verdict_of(tiny_model()) == first
    assert len(trials) == 1
    verdict_of(tiny_model(rms_norm_eps=0.1))
    verdict_of(tiny_model(seed=1))
    verdict_of(tiny_model(dtype=torch.float64))
    assert len(trials) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace('"dead": []', '"dead": ["model.nowhere"]'),
        lambda text: text.replace('"key": "', '"key": "0'),
        lambda text: text.replace('"positions": null', '"positions": -1'),
        lambda text: text.replace('"fault": ""', '"fault": null'),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_or_foreign_verdict_is_ignored(
    damage: Callable[[str], str], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = verdict_of(tiny_model())
    (place,) = (cache_folder() / "verdicts").iterdir()
    text = place.read_text()
    assert damage(text) != text
    place.write_text(damage(text))
    monkeypatch.setattr(verdicts, "_verdicts", {})
    assert verdict_of(tiny_model()) == first
    assert place.read_text() == text


def test_a_cache_that_cannot_be_written_costs_a_trial_and_no_more(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORARY_CACHE", str(tmp_path / "file"))
    assert verdict_of(tiny_model()) == verdicts.Verdict()
