"""torch.compile sees through routed layers: one graph, no break, and a change of router is noticed."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.model.attach import routing, seating
from lorary.model.live import add_expert

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
SETTINGS: list[Any] = ["lag", "norm", {"experts": ["b"]}, {"per": "token"}, CHOSEN, ["base", "arrow"]]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_routed_layer_is_one_graph(routed: Any, setting: Any, generator: torch.Generator) -> None:
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    with routing(routed, setting), torch.no_grad():
        compiled = torch.compile(lora, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, output), lora(x, output))


def test_a_compiled_model_is_one_graph_and_notices_what_changes(
    routed: Any, random_adapter: Make, generator: torch.Generator
) -> None:
    compiled = torch.compile(routed, backend="eager", fullgraph=True)
    arrow = logits(compiled)
    assert torch.equal(arrow, logits(routed))
    with routing(routed, "base"):
        assert torch.equal(logits(compiled), logits(routed))
    assert torch.equal(logits(compiled), arrow)
    add_expert(routed, random_adapter(routed, "live", generator, size=3.0))
    assert torch.equal(logits(compiled), logits(routed))
    assert not torch.equal(logits(compiled), arrow)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_what_a_routed_layer_does(routed: Any, generator: torch.Generator) -> None:
    lora = seating(routed).layers[PATH].lora
    x, output = inputs(generator)
    with torch.no_grad():
        assert torch.allclose(torch.compile(lora, fullgraph=True)(x, output), lora(x, output), atol=1e-5)
