"""The routed model over every kind of transformers model that docs/models.md names, with adapters that PEFT wrote.

Models are tiny and random. Tolerances are relative to the experts' effect: the largest difference between routed and
bare logits.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorary.errors import AdapterError, BaseModelError, RouterError
from lorary.library.store import Library
from lorary.lora.targets import layer_number
from lorary.model.attach import attach, detach, routing
from lorary.model.seating import seating

peft = pytest.importorskip("peft")
pytestmark = [
    # What PEFT has to say while it makes adapters for a tied head, and for GPT-2.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
]

ROOT = Path(__file__).parents[2]
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Architecture:
    """One row of the table in docs/models.md.

    Args:
        config: name of the configuration class.
        fields: of the configuration.
        targets: last parts of the adapted layers' paths, or PEFT's `all-linear`.
        layers: last parts of the adapted layers' paths, as found.
    """

    config: str
    fields: dict[str, Any]
    layers: str
    targets: str | tuple[str, ...] = "all-linear"


LLAMA = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", GROUPED, LLAMA),
    "Llama, with its output head tied to the embedding": Architecture(
        "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}, f"{LLAMA}, lm_head", (*LLAMA.split(", "), "lm_head")
    ),
    "Mistral": Architecture("MistralConfig", {**GROUPED, "sliding_window": 4}, LLAMA),
    "Phi (Phi-2)": Architecture("PhiConfig", SHAPE, "q_proj, k_proj, v_proj, dense, fc1, fc2"),
    "Phi-3": Architecture("Phi3Config", GROUPED, "o_proj, qkv_proj, gate_up_proj, down_proj"),
    "Qwen3": Architecture("Qwen3Config", {**GROUPED, "head_dim": 8}, LLAMA),
    "Gemma 3 (text)": Architecture(
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        LLAMA,
    ),
    "GPT-2": Architecture(
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        "c_attn, c_proj, c_fc",
    ),
    "GPT-NeoX": Architecture("GPTNeoXConfig", SHAPE, "query_key_value, dense, dense_h_to_4h, dense_4h_to_h"),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", EXPERTS, ", ".join(ATTENTION), ATTENTION),
    "T5": Architecture(
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
         "eos_token_id": 2, "decoder_start_token_id": 0, "initializer_factor": 2.0},
        "q, k, v, o, wi, wo",
    ),
}  # fmt: skip
TIED_HEAD = "Llama, with its output head tied to the embedding"
DECODERS = [name for name in ARCHITECTURES if name != "T5"]
PER = [(per, name) for per in ("token", "request") for name in DECODERS if (per, name) != ("token", TIED_HEAD)]
IDS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_model(architecture: Architecture) -> Any:
    config = getattr(transformers, architecture.config)(**architecture.fields)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with seeded(0):
        return kind.from_config(config).eval().requires_grad_(False)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    inputs = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, **inputs).logits
    return found


@dataclass(frozen=True)
class Case:
    """One architecture with three adapters that PEFT made.

    Args:
        model: the bare base; attach to a copy.
        library: of the adapters.
        answers: what PEFT computes with each.
        layers: as in `Architecture`.
    """

    model: Any
    library: Library
    answers: dict[str, Tensor]
    layers: str

    def routed(self, **settings: Any) -> Any:
        return attach(copy.deepcopy(self.model), self.library, **{"top_k": 2, **settings})

    def effect(self, model: Any) -> float:
        largest = float((logits(model) - logits(self.model)).abs().max())
        assert largest > 0.1, "the experts must do something, or nothing is tested"
        return largest


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture, folder = ARCHITECTURES[request.param], tmp_path_factory.mktemp("case")
    model, answers = make_model(architecture), {}
    library = Library.create(folder / "library", model, base_name="tiny")
    targets = architecture.targets if isinstance(architecture.targets, str) else list(architecture.targets)
    for rank in (2, 3, 4):
        config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=targets, init_lora_weights=False)
        with seeded(rank):
            theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        name = f"rank{rank}"
        # Else PEFT writes the whole output head beside its factors, where that is adapted.
        theirs.save_pretrained(folder / name, save_embedding_layers=False)
        answers[name] = logits(theirs)
        library.add(folder / name)
    return Case(model, library, answers, architecture.layers)


def test_one_expert_equals_what_peft_computes(case: Case) -> None:
    model = case.routed()
    for name, expected in case.answers.items():
        with routing(model, {"experts": [name]}):
            assert (logits(model) - expected).abs().max() < TOLERANCE * case.effect(model)


def test_the_layers_are_those_that_the_table_names(case: Case) -> None:
    paths = list(seating(case.routed()).layers)
    assert ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)) == case.layers
    assert len({layer_number(path) for path in paths} - {None}) == 2


@pytest.mark.parametrize("router", ["arrow", "norm"])
def test_a_row_alone_equals_the_row_in_its_batch(case: Case, router: str) -> None:
    model = case.routed(router=router)
    together, scale = logits(model), case.effect(model)
    for row in range(len(IDS)):
        assert (logits(model, IDS[row : row + 1]) - together[row]).abs().max() < TOLERANCE * scale


def generate(model: Any, ids: Tensor = IDS, **settings: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens and the logits of every step."""
    found = model.generate(
        ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True,
        **{"attention_mask": torch.ones_like(ids), **settings},
    )  # fmt: skip
    return found.sequences[:, -4:], torch.stack(found.logits, dim=1)


def generation_equals(case: Case, model: Any, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(left[0], right[0])
    assert (left[1] - right[1]).abs().max() < TOLERANCE * case.effect(model)


def test_padded_rows_are_answered_as_each_alone(case: Case) -> None:
    model, lengths = case.routed(), (9, 5, 7)
    mask = torch.stack([torch.arange(9) < length for length in lengths]).long()
    if not model.config.is_encoder_decoder:
        mask = mask.flip(1)  # decoders are padded on the left
    tokens, steps = generate(model, IDS * mask, attention_mask=mask)
    for row in range(len(IDS)):
        alone = generate(model, IDS[row : row + 1, mask[row].bool()])
        generation_equals(case, model, alone, (tokens[row : row + 1], steps[row : row + 1]))


def test_a_cache_changes_nothing(case: Case) -> None:
    model = case.routed()
    generation_equals(case, model, generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize(("per", "case"), PER, indirect=["case"])
def test_a_decision_for_a_token_or_a_request_needs_no_cache_either(case: Case, per: str) -> None:
    model = case.routed(per=per)
    generation_equals(case, model, generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("case", [TIED_HEAD], indirect=True)
def test_a_routed_head_that_is_given_the_last_token_alone_cannot_follow_what_others_decided(case: Case) -> None:
    model = case.routed(per="token")
    assert logits(model).isfinite().all()
    with pytest.raises(RouterError, match="27 tokens were decided, a later layer was given 3"):
        generate(model)


def test_detaching_leaves_the_bits_of_the_base(case: Case) -> None:
    model = case.routed()
    assert not torch.equal(logits(model), logits(case.model))
    with routing(model, "base"):
        assert torch.equal(logits(model), logits(case.model))
    detach(model)
    assert torch.equal(logits(model), logits(case.model))
    assert list(model.state_dict()) == list(case.model.state_dict())


@pytest.mark.parametrize("case", ["T5"], indirect=True)
@pytest.mark.parametrize("per", ["token", "request"])
def test_an_encoder_decoder_decides_layer_by_layer_alone(case: Case, per: str) -> None:
    with pytest.raises(RouterError, match=f"per='{per}' needs a decoder-only model\nfound: T5ForConditionalGeneration"):
        case.routed(per=per)


@pytest.mark.parametrize("case", ["T5"], indirect=True)
def test_rows_of_an_encoder_decoder_keep_their_settings_under_beams(case: Case) -> None:
    model, beams = case.routed(), {"num_beams": 3}
    settings: list[Any] = ["base", {"experts": ["rank3"]}, "arrow"]
    with routing(model, settings):
        together = tokens_of(model, IDS, **beams)
    for row, setting in enumerate(settings):
        with routing(model, setting):
            assert torch.equal(tokens_of(model, IDS[row : row + 1], **beams)[0], together[row])


def tokens_of(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    mask = torch.ones_like(ids)
    found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, **settings)
    return found


# What does not fit.


@pytest.mark.parametrize("case", ["Qwen3-MoE"], indirect=True)
def test_an_adapter_of_bare_parameters_is_refused_by_name(case: Case, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    peft.get_peft_model(copy.deepcopy(case.model), config).save_pretrained(tmp_path / "mixture")
    with pytest.raises(AdapterError, match="'mixture' must be a plain LoRA, but target_parameters is set"):
        case.library.add(tmp_path / "mixture")


@pytest.mark.parametrize("case", ["GPT-2"], indirect=True)
def test_an_adapter_and_a_library_of_another_architecture_are_refused(case: Case, tmp_path: Path) -> None:
    other = make_model(ARCHITECTURES["Llama"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(other), config).save_pretrained(tmp_path / "llama")
    with pytest.raises(
        AdapterError, match=r"'llama' must fit .* at model.layers.0.self_attn.q_proj\n.*no linear layer"
    ):
        case.library.add(tmp_path / "llama")
    with pytest.raises(BaseModelError, match="found: LlamaForCausalLM with 15 linear layers"):
        attach(other, case.library)


# The table.


def test_the_table_of_architectures_is_that_of_these_tests() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    cells = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    table = {row[0].strip(): row[1].replace("`", "").strip() for row in cells}
    assert {name: table.get(name) for name in ARCHITECTURES} == {n: a.layers for n, a in ARCHITECTURES.items()}
