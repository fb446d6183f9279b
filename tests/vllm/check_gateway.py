"""Ask a real vLLM server as the gateway does: `python tests/vllm/check_gateway.py FOLDER PYTHON`.

FOLDER was written by `make_case.py`; PYTHON is that of the environment that has vLLM. The server starts without
adapters, loads them when it is asked to, and must answer with our tokens, whole and streamed.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lorary.errors import UsageError
from lorary.serve.upstream import Upstream
from lorary.serve.upstream_settings import UpstreamSettings

STARTS_WITHIN_S = 600


def command(case: dict[str, Any], python: str, port: int) -> list[str]:
    """What starts the server."""
    options = {
        "model": case["base"], "served-model-name": "base", "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": 128, "max-num-seqs": 16, "max-loras": 3, "max-cpu-loras": 8,
        "max-lora-rank": case["max_lora_rank"],
    }  # fmt: skip
    pairs = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [python, "-m", "vllm.entrypoints.openai.api_server", *pairs, "--enable-lora", "--enforce-eager"]


async def check(case: dict[str, Any], url: str, process: "subprocess.Popen[bytes]") -> int:
    """Ask, and count what went wrong."""
    upstream = Upstream(UpstreamSettings(url=url))
    end = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            held = await upstream.look()
            break
        except UsageError:
            if process.poll() is not None or time.monotonic() > end:
                raise
            await asyncio.sleep(1)
    assert (upstream.kind, held.base, dict(held.adapters)) == ("vllm", "base", {}), held
    for name, folder in case["folders"].items():
        if folder is not None:
            await upstream.load(name, folder)
    held = await upstream.look()
    assert set(held.adapters) == set(case["folders"]) - {"base"}, held
    failed = 0
    for request in case["requests"]:
        named = held.bare if request["adapter"] == "base" else held.adapters[request["adapter"]]
        body = {
            **named, "prompt": request["prompt"], "max_tokens": len(request["ids"]), "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        reply = await upstream.ask("/v1/completions", json.dumps(body).encode(), {})
        answer = json.loads(b"".join([piece async for piece in reply.pieces]))
        streamed = await upstream.ask("/v1/completions", json.dumps({**body, "stream": True}).encode(), {})
        assert streamed.is_streamed
        events = b"".join([piece async for piece in streamed.pieces]).split(b"\n\n")
        pieces = [json.loads(event.removeprefix(b"data: ")) for event in events if event.startswith(b"data: {")]
        text = "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])
        (choice,) = answer["choices"]
        is_same = choice["token_ids"] == request["ids"] and text == choice["text"] and b"data: [DONE]" in events
        failed += not is_same
    missing = await upstream.ask("/v1/completions", b'{"model": "nobody", "prompt": "x"}', {})
    failed += missing.status != 404
    await missing.pieces.aclose()
    await upstream.close()
    print(f"{len(case['requests']) + 1 - failed} passed, {failed} failed")
    return int(failed > 0)


def main(folder: Path, python: str) -> int:
    """Start the server, ask it, and end it; the exit code."""
    case = json.loads((folder / "case.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command(case, python, port), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return asyncio.run(check(case, f"http://127.0.0.1:{port}", process))
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2]))
