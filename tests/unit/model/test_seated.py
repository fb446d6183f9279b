"""Experts that were decided for a whole request: worked out once, right in every pass, thread and shape after that."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import UsageError
from lorary.model.attach import routing
from lorary.model.row_gates import RequestGate
from lorary.model.row_routing import RowRouting
from lorary.model.seating import seating
from lorary.ops.native import NativeMix, native
from lorary.route.setting import Routing

Make = Callable[..., Any]
REQUEST = {"per": "request", "temperature": 0.05, "top_k": 2}
STEPS = 4
PROMPTS = torch.randint(1, 300, (6, 2, 5), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Some experts have a layer that others leave out, so that seats differ between layers."""
    model = tiny_model()
    adapters = [random_adapter(model, name, generator, size=2.0) for name in "abcd"]
    return route(model, adapters, top_k=2)


@torch.no_grad()
def decoded(model: Any, ids: Tensor, between: Callable[[], object] = lambda: None) -> Tensor:
    """Logits of a prompt and of some steps behind it, (rows, seq + steps, words)."""
    passes = [model(input_ids=ids, use_cache=True)]
    for step in range(STEPS):
        between()
        last = ids[:, step : step + 1]
        passes.append(model(input_ids=last, past_key_values=passes[-1].past_key_values, use_cache=True))
    return torch.cat([each.logits for each in passes], dim=1)


def at_once(model: Any) -> list[object]:
    return [layer.lora.in_force.at_once for layer in seating(model).layers.values()]


def test_steps_take_one_call_and_give_what_the_plan_gives(routed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with routing(routed, REQUEST):
        logits = decoded(routed, PROMPTS[0])
        kept = at_once(routed)
    with monkeypatch.context() as patched:
        patched.setattr(RequestGate, "decided", None)
        with routing(routed, REQUEST):
            expected = decoded(routed, PROMPTS[0])
            assert not any(isinstance(each, NativeMix) for each in at_once(routed))
    assert torch.allclose(logits, expected, atol=1e-5)
    if native() is not None:
        assert all(isinstance(each, NativeMix) for each in kept)


def test_requests_that_take_turns_keep_their_decisions(routed: Any) -> None:
    with routing(routed, REQUEST):
        expected = [decoded(routed, ids) for ids in PROMPTS]
        assert not torch.allclose(expected[0], expected[1])
        with torch.no_grad():
            passes = [routed(input_ids=ids, use_cache=True) for ids in PROMPTS]
            for step in range(STEPS):
                for number, ids in enumerate(PROMPTS):
                    cache, last = passes[number].past_key_values, ids[:, step : step + 1]
                    passes[number] = routed(input_ids=last, past_key_values=cache, use_cache=True)
                    assert torch.allclose(passes[number].logits, expected[number][:, 5 + step, None], atol=1e-5)


def test_threads_in_step_keep_their_decisions(routed: Any) -> None:
    with routing(routed, REQUEST):
        expected = [decoded(routed, ids) for ids in PROMPTS]
    barrier = threading.Barrier(len(PROMPTS), timeout=60.0)

    def work(number: int) -> Tensor:
        with routing(routed, REQUEST):
            return decoded(routed, PROMPTS[number], barrier.wait)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for logits, right in zip(pool.map(work, range(len(PROMPTS))), expected, strict=True):
            assert torch.allclose(logits, right, atol=1e-5)


def test_a_model_that_threads_share_keeps_their_decisions(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    """No block: all threads route by the same modules."""
    model = tiny_model()
    model = route(model, [random_adapter(model, name, generator, size=2.0) for name in "abcd"], **REQUEST)
    expected = [decoded(model, ids) for ids in PROMPTS]
    barrier = threading.Barrier(len(PROMPTS), timeout=60.0)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for logits, right in zip(
            pool.map(lambda ids: decoded(model, ids, barrier.wait), PROMPTS), expected, strict=True
        ):
            assert torch.allclose(logits, right, atol=1e-5)


def test_one_row_of_two_tokens_is_no_two_rows_of_one(routed: Any) -> None:
    with torch.no_grad(), routing(routed, REQUEST):
        cache = routed(input_ids=PROMPTS[0], use_cache=True).past_key_values
        routed(input_ids=PROMPTS[0][:, :1], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(UsageError, match="decided for 2 rows, a pass of 1 rows"):
            routed(input_ids=PROMPTS[0][:1, :2], past_key_values=cache)


def test_gradients_flow_after_steps_in_inference_mode(routed: Any) -> None:
    hidden = routed.get_input_embeddings()(PROMPTS[0]).detach()
    with routing(routed, REQUEST):
        with torch.no_grad():
            cache = routed(inputs_embeds=hidden, use_cache=True).past_key_values
        with torch.inference_mode():
            routed(inputs_embeds=hidden[:, :1], past_key_values=cache)
            cache.crop(-1)
        followed = hidden[:, :1].clone().requires_grad_()
        routed(inputs_embeds=followed, past_key_values=cache).logits.sum().backward()
        assert followed.grad is not None
        assert bool(followed.grad.isfinite().all())


def test_rows_that_come_and_go_are_followed(routed: Any) -> None:
    passes = PROMPTS[:2, :, :1]
    settings = [Routing.of(experts=["a"]), Routing.of("arrow", top_k=1), Routing.of("uniform"), Routing.of("base")]
    with torch.no_grad():
        expected = []
        for setting in settings:
            with routing(routed, setting.to_json()):
                expected.append([routed(input_ids=ids).logits for ids in passes])
        with RowRouting(routed) as rows:
            ready = [rows.ready(setting) for setting in settings]
            for first, second in [(0, 1), (1, 0), (2, 3), (3, 0), (0, 1), (3, 3), (2, 1)]:
                rows.use([ready[first], ready[second]])
                for number, ids in enumerate(passes):
                    logits = routed(input_ids=ids).logits
                    assert torch.allclose(logits[0], expected[first][number][0], atol=1e-5)
                    assert torch.allclose(logits[1], expected[second][number][1], atol=1e-5)


@pytest.mark.parametrize("setting", ["uniform", {"experts": ["b"]}, {"experts": {"a": 0.5, "c": -1.0}}])
def test_weights_that_are_fixed_take_one_call_too(routed: Any, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with routing(routed, setting):
        logits = decoded(routed, PROMPTS[0])
        kept = at_once(routed)
    with monkeypatch.context() as patched:
        patched.setattr("lorary.lora.gated.FEW_TOKENS", 0)
        with routing(routed, setting):
            expected = decoded(routed, PROMPTS[0])
            assert at_once(routed) == [None] * len(kept)
    assert torch.allclose(logits, expected, atol=1e-5)
    if native() is not None:
        assert all(isinstance(each, NativeMix) for each in kept)
