"""What a push, a pull and a clone of many small adapters move, against an S3 server on this machine (moto).

    python benchmarks/remote.py [--adapters 1000] [--json]

The base is a tiny random model; each adapter has rank 2 in one layer. Pushes run in processes of their own. One is
killed in the middle, and two push at once. Peers have no such command: there is no column of theirs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorary.adapter import Adapter, LoraFactors
from lorary.formats.peft_config import new_config
from lorary.library.store import Library
from lorary.version import __version__

PATH = "model.layers.0.self_attn.q_proj"
HIDDEN = 64
SERVER = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server in a process of its own, with a bucket."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).read()
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def adapter_of(name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = LoraFactors(torch.randn(2, HIDDEN, generator=generator), torch.randn(HIDDEN, 2, generator=generator), 2.0)
    return Adapter(name, {PATH: factors}, new_config(None, rank=2, alpha=4, target_modules=[PATH]))


def new_library(path: Path, model: Any, names: list[str], first: int = 0) -> Library:
    library = Library.create(path, model, base_name="tiny")
    for number, name in enumerate(names):
        library.add_adapter(adapter_of(name, first + number), {"tasks": [name]})
    return library


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lorary", "library", *map(str, arguments), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    return dict(json.loads(out))


def timed(*arguments: object) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    return finish(start(*arguments)), time.perf_counter() - began


def number_of_objects(address: str) -> int:
    """How many objects the bucket holds, by the pages of its list."""
    number, token = 0, ""
    while True:
        with urllib.request.urlopen(f"{address}/bucket?list-type=2{token}") as response:
            text = response.read().decode()
        number += text.count("<Key>")
        if "<NextContinuationToken>" not in text:
            return number
        token = "&continuation-token=" + text.partition("<NextContinuationToken>")[2].partition("<")[0]


def measure(folder: Path, address: str, adapters: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=300)  # fmt: skip
    model = LlamaForCausalLM(config)
    rows: list[dict[str, Any]] = []

    def add(case: str, result: dict[str, Any], seconds: float) -> None:
        for figure, unit in (("requests", "requests"), ("bytes_sent", "bytes"), ("bytes_received", "bytes")):
            rows.append({"case": case, "figure": figure, "unit": unit, "ours": result[figure], "better": "lower"})
        rows.append({"case": case, "figure": "time", "unit": "s", "ours": round(seconds, 1), "better": "lower"})
        print(f"{case}: {result['requests']} requests, {result['bytes_sent']:,} bytes sent, "
              f"{result['bytes_received']:,} received, {seconds:.1f} s", file=sys.stderr)  # fmt: skip

    library = new_library(folder / "lib", model, [f"a{number:04}" for number in range(adapters)])
    url = "s3://bucket/lib"
    process = start("push", library.path, url)
    while process.poll() is None and number_of_objects(address) < adapters:  # about half of them
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    arrived = number_of_objects(address)
    resumed, seconds = timed("push", library.path, url)
    add(f"push, after one that was killed with {arrived} objects sent", resumed, seconds)
    add("push of the same to an empty place", *timed("push", library.path, "s3://bucket/other"))
    add("clone", *timed("clone", url, folder / "copy"))
    copy = Library.open(folder / "copy")
    assert copy.verify() == []
    library.replace_adapter(adapter_of("a0007", -1), {"tasks": ["a0007"]})
    add("push of one change", *timed("push", library.path, url))
    add("push of no change", *timed("push", library.path, url))
    add("pull of one change", *timed("pull", copy.path))
    libraries = [new_library(folder / f"p{number}", model, [f"p{number}-{n}" for n in range(20)], 10_000 * (number + 1))
                 for number in range(2)]  # fmt: skip
    began = time.perf_counter()
    pushes = [start("push", each.path, url) for each in libraries]
    for number, push in enumerate(pushes):
        add(f"push of 20 more, process {number + 1} of 2 at once", finish(push), time.perf_counter() - began)
    add("pull of these", *timed("pull", copy.path))
    expected = {*library.names(), *libraries[0].names(), *libraries[1].names()}
    assert set(Library.open(copy.path).names()) == expected, "an adapter was lost"
    assert copy.verify() == []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server() as address:
        os.environ.update(AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="nothing-secret",
                          AWS_REGION="us-east-1")  # fmt: skip
        rows = measure(Path(folder), address, arguments.adapters)
    versions = {"lorary": __version__, **{name: version(name) for name in ("obstore", "moto")}}
    if arguments.json:
        print(json.dumps({"rows": rows, "machine": os.uname().machine, "versions": versions}))


if __name__ == "__main__":
    main()
