"""Ask vLLM what `make_case.py` wrote: `python tests/vllm/check_case.py FOLDER`, in an environment that has vLLM.

All requests go in one batch: routed adapters, an ordinary one, and the base. Tokens must be ours, and log-probabilities
to within a thousandth. A server with fewer slots than adapters must answer the same, and one without the plugin must
not, since then nothing would have been tested.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
WITHIN = 1e-3


def serve(case: dict[str, Any], max_loras: int) -> Any:
    """A server in this process."""
    from vllm import LLM

    return LLM(
        model=case["base"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
        max_num_seqs=32, enable_lora=True, max_loras=max_loras, max_cpu_loras=8, max_lora_rank=case["max_lora_rank"],
        seed=0,
    )  # fmt: skip


def ask(llm: Any, case: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of all requests, in one call."""
    from vllm.lora.request import LoRARequest

    from vllm import SamplingParams

    numbers = {name: number for number, name in enumerate(case["folders"], start=1)}
    requests = case["requests"]
    loras = [
        None if (folder := case["folders"][name]) is None else LoRARequest(name, numbers[name], folder)
        for name in (request["adapter"] for request in requests)
    ]
    length = len(requests[0]["ids"])
    sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    outputs = [answer.outputs[0] for answer in llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)]
    return [
        (list(out.token_ids), [row[i].logprob for i, row in zip(out.token_ids, out.logprobs, strict=True)])
        for out in outputs
    ]


def compare(case: dict[str, Any], answers: list[tuple[list[int], list[float]]]) -> dict[str, int]:
    """By adapter, how many answers differ from ours."""
    wrong = dict.fromkeys(case["folders"], 0)
    for request, (ids, logprobs) in zip(case["requests"], answers, strict=True):
        off = max(abs(a - b) for a, b in zip(logprobs, request["logprobs"], strict=True))
        wrong[request["adapter"]] += ids != request["ids"] or off > WITHIN
    return wrong


def main(folder: Path) -> int:
    """Run the checks; the exit code."""
    import vllm

    case = json.loads((folder / "case.json").read_text())
    number = len(case["requests"]) // len(case["folders"])
    failed = 0
    for max_loras in (len(case["folders"]), 2):
        llm = serve(case, max_loras)
        wrong = compare(case, ask(llm, case))
        failed += sum(wrong.values())
        for name, count in wrong.items():
            print(f"vLLM {vllm.__version__}, {max_loras} slots, {name}: {number - count} of {number} answers are ours")
        del llm
    # Each routed adapter must answer otherwise where nothing gates it.
    without = subprocess.run(
        [sys.executable, __file__, str(folder), "--without-plugin"], env={**os.environ, "VLLM_PLUGINS": "none"}
    )
    failed += without.returncode
    print(f"{2 * len(case['requests']) + 1 - failed} passed, {failed} failed")
    return int(failed > 0)


def without_plugin(folder: Path) -> int:
    """0 where every answer of a routed adapter differs from ours."""
    case = json.loads((folder / "case.json").read_text())
    number = len(case["requests"]) // len(case["folders"])
    wrong = compare(case, ask(serve(case, len(case["folders"])), case))
    for name, count in wrong.items():
        print(f"without the plugin, {name}: {number - count} of {number} answers are ours", flush=True)
    return int(any(count < number for name, count in wrong.items() if name not in ("base", "all")))


if __name__ == "__main__":
    work = without_plugin if "--without-plugin" in sys.argv else main
    sys.exit(work(Path(sys.argv[1]).resolve()))
