"""What vLLM is to answer as we do: `python tests/vllm/make_case.py FOLDER`, in the environment of the other tests.

Writes a random Llama, a library over it, exports of that library, and case.json: requests with the tokens that our
routed model gives, greedily, and the log-probability of each. `check_case.py` asks vLLM the same.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft import new_config
from lorary.library.store import Library
from lorary.lora.targets import find_targets
from lorary.model.attach import attach, routing
from lorary.recipes.export import run_export
from lorary.route.setting import Routing

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_PROMPTS, NUM_TOKENS = 4, 10
SETTINGS = {
    "arrow": {"router": "arrow", "top_k": 2},
    "projection": {"router": "projection", "top_k": 2, "temperature": 0.5},
    "norm": {"router": "norm", "top_k": 1},
}


def make_base() -> Any:
    """A random Llama of three layers, whose logits are far from ties."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=0, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().requires_grad_(False).eval()


def make_tokenizer() -> Any:
    """A tokenizer of single bytes, for a server that wants one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<|end|>": 0, **{letter: number for number, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def make_adapter(
    model: Any, name: str, rank: int, targets: tuple[str, ...], size: float, layers: Any = None
) -> Adapter:
    """A random adapter; of size 0, one that does nothing."""
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    modules = {}
    shapes = find_targets(model, targets, layers)
    for path, (d_in, d_out) in shapes.items():
        lora_a = torch.randn(rank, d_in, generator=draw) / d_in**0.5
        lora_b = size * torch.randn(d_out, rank, generator=draw) / rank**0.5
        modules[path] = LoraFactors(lora_a, lora_b, 2.0)
    return Adapter(name, modules, new_config(None, rank=rank, alpha=2 * rank, target_modules=sorted(shapes)))


def greedy(model: Any, prompt: list[int]) -> dict[str, list[Any]]:
    """The tokens behind a prompt, and the log-probability of each; nothing ends an answer."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    ids = out.sequences[0, len(prompt) :].tolist()
    logprobs = [float(row[0].log_softmax(-1)[i]) for row, i in zip(out.logits, ids, strict=True)]
    return {"ids": ids, "logprobs": logprobs}


def main(folder: Path) -> None:
    """Write the case."""
    shutil.rmtree(folder, ignore_errors=True)
    model = make_base()
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    library = Library.create(folder / "lib", folder / "base")
    for adapter in (
        make_adapter(model, "all", 4, LINEARS, 0.5),
        make_adapter(model, "attention", 8, ("q_proj", "v_proj"), 0.8),
        make_adapter(model, "late", 2, ("o_proj", "down_proj", "up_proj"), 0.8, [1, 2]),
        make_adapter(model, "one", 1, LINEARS, 0.6),
        make_adapter(model, "zero", 3, LINEARS, 0.0),
    ):
        library.add_adapter(adapter, {"tasks": [adapter.name]})
    folders: dict[str, str | None] = {"base": None, "all": str(library.path / "adapters" / "all")}
    ranks = []
    for name, setting in SETTINGS.items():
        result = run_export(str(library.path), str(folder / "out"), **setting)
        folders[name] = result.adapter
        ranks.append(result.max_lora_rank)
    rows: dict[str, Routing] = {"base": Routing.of("base"), "all": Routing.of(experts=["all"])}
    rows.update({name: Routing.of(**setting) for name, setting in SETTINGS.items()})
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 30, (NUM_PROMPTS,), generator=draw).tolist()
    prompts = [torch.randint(1, 300, (length,), generator=draw).tolist() for length in lengths]
    attach(model, library)
    requests = []
    for prompt in prompts:
        for name, setting in rows.items():
            with routing(model, setting):
                requests.append({"adapter": name, "prompt": prompt, **greedy(model, prompt)})
    different = {tuple(request["ids"]) for request in requests}
    assert len(different) > 0.8 * len(requests), "adapters must change answers, else nothing is tested"
    case = {"base": str(folder / "base"), "folders": folders, "max_lora_rank": max(ranks), "requests": requests}
    (folder / "case.json").write_text(json.dumps(case))
    print(f"{len(requests)} requests, {len(different)} different answers: {folder / 'case.json'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
