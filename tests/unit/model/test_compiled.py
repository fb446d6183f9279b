"""torch.compile sees through routed layers: one graph, no break, and a change of router is noticed.

It does not see through the type checker that these tests put around every function of the package. So the checks run
in a process of their own, without it.
"""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from tests.support.adapters import as_dora, with_biases
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import StaticCache

from lorary.model.attach import routing
from lorary.model.live import add_expert
from lorary.model.seating import seating

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (2, 6), generator=torch.Generator().manual_seed(13))
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def nothing_compiled_stays() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model(num_hidden_layers=1)
    return route(model, [random_adapter(model, name, generator, rank=2 + i) for i, name in enumerate("abc")], top_k=2)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def inputs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 32, generator=generator), torch.randn(2, 5, 32, generator=generator)


CHOSEN = {"top_p": 0.9, "threshold": 0.1, "null": 0.5, "input_norm": "layer"}
SETTINGS: list[Any] = ["lag", {"experts": ["b"]}, {**CHOSEN, "per": "token"}, ["base", "arrow"]]


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.filterwarnings("ignore:router '.*' scores a DoRA:UserWarning")
def check_that_a_routed_layer_is_one_graph(
    routed: Any, random_adapter: Make, setting: Any, generator: torch.Generator, is_plain: bool
) -> None:
    if not is_plain:
        for name, more in (("x", partial(as_dora, model=routed)), ("y", with_biases)):
            add_expert(routed, more(random_adapter(routed, name, generator), generator=generator))
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    with routing(routed, setting), torch.no_grad():
        compiled = torch.compile(lora, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x, output), lora(x, output), atol=1e-5)


def check_that_a_compiled_model_is_one_graph_and_notices_what_changes(
    routed: Any, random_adapter: Make, generator: torch.Generator
) -> None:
    compiled = torch.compile(routed, backend="eager", fullgraph=True)
    arrow = logits(compiled)
    # Beside it another plan may run.
    assert torch.allclose(arrow, logits(routed), atol=1e-5)
    with routing(routed, "base"):
        assert torch.allclose(logits(compiled), logits(routed), atol=1e-5)
    assert torch.equal(logits(compiled), arrow)
    add_expert(routed, random_adapter(routed, "live", generator, size=3.0))
    assert torch.allclose(logits(compiled), logits(routed), atol=1e-5)
    assert not torch.allclose(logits(compiled), arrow, atol=1e-2)


def check_that_compiled_code_follows_the_block_of_its_thread(routed: Any, generator: torch.Generator) -> None:
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    compiled = torch.compile(lora, backend="eager", fullgraph=True)
    settings: list[Any] = ["lag", {"experts": ["b"]}, {"per": "token"}]
    barrier = threading.Barrier(len(settings) + 1, timeout=60)

    def run_in_thread(setting: Any) -> tuple[Tensor, Tensor]:
        with routing(routed, setting) if setting else nullcontext(), torch.no_grad():
            barrier.wait()
            found = lora(x, output), compiled(x, output)
            barrier.wait()
        return found

    with ThreadPoolExecutor(len(settings) + 1) as pool:
        for plain, ours in pool.map(run_in_thread, [*settings, None]):
            assert torch.allclose(ours, plain, atol=1e-5)


def check_that_blocks_entered_again_are_not_compiled_again(routed: Any, generator: torch.Generator) -> None:
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    graphs = CompileCounter()
    compiled = torch.compile(lora, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            for setting in ("lag", "norm"):
                with routing(routed, setting):
                    assert torch.allclose(compiled(x, output), lora(x, output), atol=1e-5)
    assert graphs.frame_count == 2


@pytest.mark.parametrize("setting", ["arrow", {"per": "token"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def check_that_decoding_over_a_static_cache_is_one_graph(
    random_adapter: Any, route: Any, generator: torch.Generator, family: str, setting: Any
) -> None:
    targets = {"llama": ("q_proj", "down_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h")}[family]
    model = tiny_family(family, dtype=torch.float32)
    experts = [random_adapter(model, name, generator, rank=2, targets=targets) for name in "abcd"]
    router = {"router": setting} if isinstance(setting, str) else setting
    route(model, experts, top_k=2, **router)
    ids, graphs = torch.randint(3, 96, (2, 9), generator=generator), CompileCounter()
    caches = [StaticCache(model.config, max_cache_len=16) for _ in range(2)]
    step = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)
    with torch.no_grad():
        for cache in caches:
            model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
        for position in (6, 7, 8):
            token = ids[:, position : position + 1]
            ours, plain = (
                run(input_ids=token, past_key_values=cache, use_cache=True).logits
                for run, cache in zip((step, model), caches, strict=True)
            )
            assert torch.allclose(ours, plain, atol=1e-4)
        with routing(model, "base"):
            bare = model(input_ids=ids, use_cache=False).logits[:, -1:]
    assert graphs.frame_count == 1
    assert not torch.allclose(plain, bare, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own
def inductor_computes_what_a_routed_layer_does(routed: Any, generator: torch.Generator) -> None:
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    with torch.no_grad():
        assert torch.allclose(torch.compile(lora, fullgraph=True)(x, output), lora(x, output), atol=1e-5)


def fused_layers_are_one_graph(routed: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    with torch.no_grad():
        expected, graphs = lora(x, output), CompileCounterWithBackend("eager")
        monkeypatch.setenv("LORARY_FUSED", "1")
        with routing(routed, {"router": "arrow", "top_k": 2}):
            compiled = torch.compile(lora, backend=graphs, fullgraph=True)
            assert torch.allclose(compiled(x, output), expected, atol=1e-5)
            names = [str(node.target) for graph in graphs.graphs for node in graph.graph.nodes]
            assert [name.split(".")[1] for name in names if "fused" in name] == ["fused_shrink", "fused_expand"]
    assert graphs.frame_count == 1


def run(functions: str) -> None:
    """Run the functions of this file whose names begin so, as pytest runs tests."""
    options = [
        "-o",
        "addopts=--import-mode=importlib",
        "-o",
        f"python_functions={functions}",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.slow
def test_routed_models_compile_without_a_graph_break() -> None:
    run("check_*")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_what_eager_routing_does() -> None:
    run("inductor_*")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or TRITON_INTERPRET is not 1: make check-triton",
)
def test_the_fused_plan_is_one_graph() -> None:
    run("fused_*")
