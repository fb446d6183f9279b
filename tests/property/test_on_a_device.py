"""An accelerator gives what the CPU gives, for every rule and moment of decision: `pytest -m gpu`.

`LORARY_TEST_DEVICE=cpu pytest -m gpu` rehearses these tests without an accelerator.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorary.lora import gated
from lorary.model.attach import detach, routing
from lorary.model.prepare import prepare
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.route import ROUTERS

pytestmark = pytest.mark.gpu
Make = Callable[..., Any]
NAMES = ("a", "b", "c", "d", "e", "f")
HIDDEN = 32
SETTINGS: dict[str, Any] = {
    **{f"{name} per {per}": {"router": name, "per": per} for name, rule in ROUTERS.items() for per in rule.pers},
    "arrow with all steps": {"top_p": 0.9, "threshold": 1e-3, "null": 0.2, "top_k": 3},
    "norm of layer-normalised inputs": {"router": "norm", "input_norm": "layer"},
    "factors": {"mix": "factors"},
    "general experts": {"general": ["a"]},
    "uniform": "uniform",
    "one expert": {"experts": ["b"]},
    "rows": ["arrow", {"experts": ["b"]}, "base"],
}
EVERY = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
IDS = torch.randint(1, 300, (3, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def device() -> torch.device:
    asked = os.environ.get("LORARY_TEST_DEVICE")
    if asked:
        return torch.device(asked)
    if not torch.accelerator.is_available():
        pytest.skip("this machine has no accelerator that PyTorch can use")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


@pytest.fixture
def dtype(device: torch.device) -> torch.dtype:
    if device.type == "mps":
        pytest.skip("the accelerator has no float64, without which these tests cannot be exact")
    return torch.float64


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, dtype: torch.dtype) -> Any:
    model = tiny_model(dtype=dtype)
    routed = route(model, [random_adapter(model, name, generator, rank=2) for name in NAMES], top_k=2)
    widths = {path: layer.lora.down.shape[1] for path, layer in seating(routed).layers.items()}
    for router in ("centroid", "phatgoose"):
        rows = {n: {path: torch.randn(d, generator=generator) for path, d in widths.items()} for n in NAMES}
        prepare(routed, router, rows)
    prepare(routed, "contrast", {name: {path: torch.tensor([0.1, 1.0]) for path in widths} for name in NAMES})
    for kind, shape in (("samples", (6, HIDDEN)), ("retrieval", (HIDDEN,)), ("task_predictor", (HIDDEN + 1,))):
        prepare(routed, f"{kind}_early", {n: {"request": torch.randn(shape, generator=generator)} for n in NAMES})
    return routed


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS.to(model.device), **inputs).logits
    return found.cpu()


@EVERY
def test_logits_are_those_of_the_cpu(routed: Any, device: torch.device, setting: Any) -> None:
    mask = torch.stack([torch.arange(9) >= start for start in (0, 5, 2)]).long()
    with routing(routed, setting):
        expected = logits(routed, attention_mask=mask)
    routed.to(device)
    with routing(routed, setting):
        found = logits(routed, attention_mask=mask.to(device))
    real = mask.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-9)


@EVERY
def test_cached_generation_is_that_of_the_cpu(routed: Any, device: torch.device, setting: Any) -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with routing(routed, setting):
        expected = routed.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    routed.to(device)
    ids = IDS.to(device)
    with routing(routed, setting):
        for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
            found = routed.generate(ids, attention_mask=torch.ones_like(ids), **settings, **more)
            assert torch.equal(found.cpu(), expected)


@EVERY
def test_the_order_of_the_experts_changes_nothing_there(
    tiny_model: Make, random_adapter: Make, route: Make, device: torch.device, dtype: torch.dtype, setting: Any
) -> None:
    rule = ROUTERS[setting.get("router", "arrow")] if isinstance(setting, dict) else None
    if rule is None or rule.tries or rule.needs not in ("weights", "probe"):
        pytest.skip("what was prepared for experts does not follow another order")
    model = tiny_model(dtype=dtype)
    experts = [random_adapter(model, name, torch.Generator().manual_seed(i), rank=2) for i, name in enumerate(NAMES)]
    found = []
    for order in (experts, experts[::-1]):
        route(model.to(device), order, top_k=2)
        with routing(model, setting):
            found.append(logits(model))
        detach(model)
    assert torch.equal(*found)


def test_a_base_in_bfloat16_chooses_by_scores_in_float32(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator, device: torch.device
) -> None:
    model = tiny_model(dtype=torch.bfloat16).to(device)
    route(model, [random_adapter(model, name, generator, rank=2) for name in NAMES], top_k=2)
    path, layer = next(iter(seating(model).layers.items()))
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    with trace(model) as traced:
        assert logits(model).dtype == torch.bfloat16
    handle.remove()
    expected = (seen[0].float() @ layer.lora.prototypes.mT).abs().topk(2).indices.sort().values
    assert layer.lora.down.dtype == torch.float32
    assert torch.equal(traced.stacked()[0].topk(2).indices.sort().values, expected.cpu())


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        pytest.skip("CUDA alone tells when the host waits")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("setting", ["arrow", "lag", {"per": "token"}, "uniform", ["arrow", "base", "arrow"]], ids=str)
@torch.no_grad()
def test_the_host_does_not_wait_in_a_layer(
    routed: Any, device: torch.device, setting: Any, generator: torch.Generator
) -> None:
    routed.to(device)
    with routing(routed, setting):
        logits(routed)
        layers = seating(routed).layers
        x = {layer.lora.down.shape[1]: torch.randn(3, 4, layer.lora.down.shape[1]) for layer in layers.values()}
        x = {size: tensor.to(device, torch.float64) for size, tensor in x.items()}
        outputs = {path: torch.zeros(3, 4, layer.lora.up.shape[1]).to(x[32]) for path, layer in layers.items()}
        with waiting_is_an_error(device):
            for path, layer in layers.items():
                assert isinstance(layer.lora, nn.Module)
                layer.lora(x[layer.lora.down.shape[1]], outputs[path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 130])
@torch.no_grad()
def test_the_fused_plan_gives_what_the_plain_ones_give(
    device: torch.device, generator: torch.Generator, dtype: torch.dtype, num_tokens: int,
    monkeypatch: pytest.MonkeyPatch, tiny_model: Make, random_adapter: Make, route: Make,
) -> None:  # fmt: skip
    if find_spec("triton") is None or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        pytest.skip("Triton is not installed, or cannot run on this device")
    model = tiny_model(num_hidden_layers=1, dtype=dtype).to(device)
    route(model, [random_adapter(model, name, generator, rank=2) for name in NAMES], top_k=2)
    lora = next(iter(seating(model).layers.values())).lora
    # Exact products: both plans choose the same, and differ by rounding alone.
    x = torch.randint(-2, 3, (num_tokens, 32), generator=generator).to(device, dtype)
    lora.down.copy_(torch.randint(-2, 3, lora.down.shape, generator=generator))
    output = torch.randn(num_tokens, 32, generator=generator).to(device, dtype)
    monkeypatch.setattr(gated, "is_native", lambda tensor: False)  # C++ may choose another of equal scores
    found = []
    for value in ("0", "1"):
        monkeypatch.setenv("LORARY_FUSED", value)
        with routing(model, {"router": "arrow", "top_k": 2}):
            assert lora.in_force.is_fused == (value == "1")
            found.append(lora(x, output).float())
    sizes = found[0].abs() + (found[0] - output.float()).abs()
    assert bool(((found[1] - found[0]).abs() <= 2 * torch.finfo(dtype).eps * sizes + 1e-5).all())
    assert not torch.equal(found[0], output.float())
