"""Adapters as PEFT makes them, of all shapes, through a library and back; writes the table of docs/interchange.md.

python -m tests.support.interchange [--write]
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import lorary
from lorary.errors import LoraryError
from lorary.formats.quiet import quiet_transformers
from lorary.library.store import Library
from lorary.recipes.export import run_static_export

PAGE = Path(__file__).parents[2] / "docs" / "interchange.md"
BEGIN, END = "<!-- adapters: made by python -m tests.support.interchange --write -->", "<!-- adapters: end -->"
# Of the largest effect that the adapter has on a logit.
AGREEMENT = 1e-5
_SHAPE = {"vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}


def _llama(*, tied: bool = False, biases: bool = False) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            **_SHAPE, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    )


def _phi3() -> Any:
    return Phi3ForCausalLM(
        Phi3Config(
            **_SHAPE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=None,
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An adapter, by what is said of it in the table.

    Args:
        title: the shape.
        config: arguments of PEFT's LoraConfig.
        model: makes the base.
        dtype: of the factors.
        stated: fields that its configuration states after all, which PEFT does not train with.
    """

    title: str
    config: dict[str, Any]
    model: Callable[[], Any] = _llama
    dtype: torch.dtype = torch.float32
    stated: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        refusal: why it was not taken in; None where it was.
        routed: largest difference of the routed model's logits to PEFT's, relative to the effect.
        back: the same for PEFT with the exported adapter.
        merged: the same for the base merged with it, as transformers loads it; None where that was refused.
        merged_refusal: why.
        is_same_file: whether the exported files are those that PEFT wrote, byte for byte.
    """

    refusal: str | None = None
    routed: float = 0.0
    back: float = 0.0
    merged: float | None = None
    merged_refusal: str | None = None
    is_same_file: bool = False


def _plain(targets: Any = ("q_proj", "v_proj"), rank: int = 4, **fields: Any) -> dict[str, Any]:
    names = list(targets) if isinstance(targets, tuple) else targets
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": names, **fields}


CASES = [
    *(Case(f"rank {rank}", _plain(rank=rank)) for rank in (1, 2, 8, 16, 64)),
    Case("alpha below the rank", _plain(lora_alpha=1)),
    Case("alpha no whole number", _plain(lora_alpha=2.5)),
    Case("rsLoRA", _plain(use_rslora=True)),
    Case("rsLoRA, rank 64", _plain(rank=64, use_rslora=True)),
    Case("rank pattern", _plain(rank_pattern={"v_proj": 2})),
    Case("rank pattern by expression", _plain(rank_pattern={r"layers\.[01]\..*q_proj": 7})),
    Case("alpha pattern", _plain(alpha_pattern={"q_proj": 32})),
    Case("rank and alpha pattern, rsLoRA",
         _plain(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3}, use_rslora=True)),
    Case("one target", _plain(("o_proj",))),
    Case("feed-forward layers", _plain(("gate_proj", "up_proj", "down_proj"))),
    Case("`all-linear`", _plain("all-linear")),
    Case("targets by expression", _plain(r".*\.layers\.[02]\.(self_attn\.q_proj|mlp\.up_proj)")),
    Case("excluded modules", _plain("all-linear", exclude_modules=["k_proj", "down_proj"])),
    Case("`layers_to_transform`", _plain(layers_to_transform=[0, 2])),
    Case("`layers_to_transform` with `layers_pattern`", _plain(layers_to_transform=1, layers_pattern="layers")),
    Case("dropout", _plain(lora_dropout=0.3)),
    Case("bfloat16 factors", _plain(), dtype=torch.bfloat16),
    Case("float16 factors", _plain(), dtype=torch.float16),
    Case("Gaussian initialisation", _plain(init_lora_weights="gaussian")),
    Case("Conv1D", _plain(("c_attn",), fan_in_fan_out=True), _gpt2),
    Case("Conv1D, all layers", _plain(("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True), _gpt2),
    Case("fused query, key and value", _plain(("qkv_proj",)), _phi3),
    Case("fused gate and up", _plain(("qkv_proj", "gate_up_proj"), rank_pattern={"gate_up_proj": 9}), _phi3),
    Case("the output head", _plain(("lm_head", "q_proj"))),
    Case("the output head, tied to the embedding", _plain(("lm_head",)), lambda: _llama(tied=True)),
    Case("`lora_bias`, layers without a bias", _plain(lora_bias=True)),
    Case("`lora_bias`", _plain("all-linear", lora_bias=True), lambda: _llama(biases=True)),
    Case("`lora_bias`, Conv1D, rsLoRA", _plain(("c_attn", "c_fc"), lora_bias=True, use_rslora=True), _gpt2),
    Case("`lora_bias`, bfloat16 factors", _plain(lora_bias=True), lambda: _llama(biases=True), torch.bfloat16),
    *(Case(f"DoRA, rank {rank}", _plain(rank=rank, use_dora=True)) for rank in (1, 4, 64)),
    Case("DoRA, layers with a bias", _plain("all-linear", use_dora=True), lambda: _llama(biases=True)),
    Case("DoRA, rsLoRA", _plain(use_dora=True, use_rslora=True)),
    Case("DoRA, rank and alpha pattern",
         _plain(use_dora=True, rank_pattern={"v_proj": 9}, alpha_pattern={"layers.1.self_attn.q_proj": 3})),
    Case("DoRA, some targets and layers",
         _plain(("q_proj", "down_proj"), use_dora=True, layers_to_transform=[0, 2])),
    Case("DoRA, Conv1D", _plain(("c_attn", "c_proj", "c_fc"), use_dora=True, fan_in_fan_out=True), _gpt2),
    Case("DoRA, fused layers", _plain(("qkv_proj", "gate_up_proj"), use_dora=True), _phi3),
    Case("DoRA, the output head", _plain(("lm_head", "q_proj"), use_dora=True)),
    Case("DoRA, bfloat16 factors", _plain(use_dora=True), dtype=torch.bfloat16),
    Case("DoRA, float16 factors", _plain(use_dora=True), dtype=torch.float16),
    Case("DoRA and `lora_bias`", _plain(use_dora=True), stated={"lora_bias": True}),
    Case("biases of the base (`bias`)", _plain(bias="all")),
    Case("an embedding", _plain(("embed_tokens", "q_proj"))),
    Case("whole layers (`modules_to_save`)", _plain(modules_to_save=["lm_head"])),
    Case("trained tokens", _plain(trainable_token_indices=[1, 2])),
    Case("replicated layers", _plain(layer_replication=[(0, 2), (1, 3)])),
    Case("PiSSA", _plain(init_lora_weights="pissa")),
]  # fmt: skip


def outcome_of(case: Case, folder: Path) -> Outcome:
    """Make an adapter with PEFT, take it in, route to it, export it, and load it in PEFT again.

    Args:
        case: the adapter.
        folder: an empty folder.
    """
    with warnings.catch_warnings(), quiet_transformers(), torch.random.fork_rng(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT's remarks on Conv1D, tied weights and saved embeddings
        torch.manual_seed(0)
        model = case.model().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)  # they begin as zeros
        model.save_pretrained(folder / "base")
        tokens = torch.randint(97, (2, 9))
        bare = model(tokens).logits
        expected = _made_by_peft(case, folder, tokens)
        library = Library.create(folder / "lib", model, base_name=str(folder / "base"))
        try:
            library.add(folder / "adapter")
        except LoraryError as error:
            return Outcome(refusal=f"{error.rule}; found: {error.found}".replace(str(folder), "…"))
        effect = float((expected - bare).abs().max())
        lorary.attach(model, library, experts=["adapter"])
        routed = model(tokens).logits
        lorary.detach(model)
        exported = Path(run_static_export(str(library.path), str(folder / "out"), engine="peft").path) / "adapter"
        back = PeftModel.from_pretrained(_loaded(case, folder), exported).eval()(tokens).logits
        merged, refusal = _merged(case, library, folder, tokens)
        names = ("adapter_config.json", "adapter_model.safetensors")
        return Outcome(
            routed=float((routed - expected).abs().max()) / effect,
            back=float((back - expected).abs().max()) / effect,
            merged=None if merged is None else float((merged - expected).abs().max()) / effect,
            merged_refusal=refusal,
            is_same_file=all((folder / "adapter" / n).read_bytes() == (exported / n).read_bytes() for n in names),
        )


def _loaded(case: Case, folder: Path) -> Any:
    model: Any = case.model()
    return type(model).from_pretrained(folder / "base").eval()


def _made_by_peft(case: Case, folder: Path, tokens: Tensor) -> Tensor:
    """Save an adapter with numbers of its own in all that it trains, and give what PEFT computes with it."""
    logits: Tensor
    peft = get_peft_model(_loaded(case, folder), LoraConfig(task_type="CAUSAL_LM", **case.config)).eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            # A magnitude begins as the norm of its row of the base.
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter)) if "magnitude" in name else parameter.normal_(std=0.3)
            parameter.copy_(parameter.to(case.dtype).to(parameter.dtype))
    if case.dtype != torch.float32:
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(case.dtype)
    peft.save_pretrained(folder / "adapter")
    if case.stated is not None:
        config = folder / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **case.stated}))
        logits = peft(tokens).logits
        return logits
    loaded = PeftModel.from_pretrained(_loaded(case, folder), folder / "adapter").eval()
    logits = loaded(tokens).logits
    return logits


def _merged(case: Case, library: Library, folder: Path, tokens: Tensor) -> tuple[Tensor | None, str | None]:
    """The logits of the base merged with the adapter, without its tokenizer, which these bases lack."""
    from lorary.model.merged import add_to_weights

    model = _loaded(case, folder)
    try:
        add_to_weights(model, library.get("adapter"))
    except LoraryError as error:
        return None, f"{error.rule}; found: {error.found}"
    return model(tokens).logits, None


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| adapter | in, routed, out to PEFT | merged into the base |"
    yield "|---|---|---|"
    for case in CASES:
        with TemporaryDirectory() as folder:
            outcome = outcome_of(case, Path(folder))
        yield line_of(case, outcome)


def line_of(case: Case, outcome: Outcome) -> str:
    """The line of the table for what became of a case."""
    if outcome.refusal is not None:
        return f"| {case.title} | refused: {_cell(outcome.refusal)} | – |"
    merged = "exact" if outcome.merged is not None else f"refused: {_cell(str(outcome.merged_refusal))}"
    return f"| {case.title} | exact | {merged} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def page() -> str:
    """The page as it is to be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return "\n".join([before + BEGIN, "", *table(), "", END]) + rest.partition(END)[2]


if __name__ == "__main__":
    made = page()
    is_stale = made != PAGE.read_text(encoding="utf-8")
    if is_stale and "--write" in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    print("\n".join(made.partition(BEGIN)[2].partition(END)[0].split("\n")))
    sys.exit(1 if is_stale and "--write" not in sys.argv else 0)
