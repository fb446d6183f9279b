"""Contrast: experts against what they score on everybody's prompts, held against its definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.errors import RouterError, TaskError, UsageError
from lorary.model.attach import attach, detach, routing, seating
from lorary.model.pooled import pooled_moments
from lorary.model.prepare import prepare
from lorary.model.setting import Routing
from lorary.model.trace import trace

Make = Callable[..., Any]
NAMES = ("a", "b", "c", "d")
PROMPTS = [list(range(start, start + length)) for start, length in ((5, 6), (40, 9), (80, 4), (120, 9), (7, 5))]


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Four experts of unequal ranks; the last one does nothing."""
    model = tiny_model(dtype=torch.float64)
    sizes = {name: float(name != "d") for name in NAMES}
    experts = [random_adapter(model, name, generator, rank=1 + i, size=sizes[name]) for i, name in enumerate(NAMES)]
    return route(model, experts)


def row_means(model: Any, adapters: dict[str, Adapter], prompt: list[int]) -> dict[str, dict[str, float]]:
    """Mean length of the unit tokens within each expert's input space, from the full updates."""
    inputs: dict[str, Tensor] = {}
    paths = next(iter(adapters.values())).modules
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
        for path in paths
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    found: dict[str, dict[str, float]] = {}
    for name, adapter in adapters.items():
        for path, factors in adapter:
            x = inputs[path][0] / inputs[path][0].norm(dim=1, keepdim=True)
            update = factors.lora_b.double() @ factors.lora_a.double()
            if update.any():
                basis = torch.linalg.svd(update).Vh[: factors.rank]
                found.setdefault(name, {})[path] = float((x @ basis.T).norm(dim=1).mean())
    return found


def by_hand(model: Any, adapters: dict[str, Adapter], prompt: list[int]) -> Tensor:
    pool = [row_means(model, adapters, other) for other in PROMPTS]
    own = row_means(model, adapters, prompt)
    scores = []
    for name in NAMES[:3]:
        z = []
        for path, score in own[name].items():
            values = torch.tensor([row[name][path] for row in pool], dtype=torch.float64)
            z.append((score - values.mean()) / values.std())
        scores.append(torch.stack(z).mean())
    return torch.stack([*scores, torch.tensor(-torch.inf, dtype=torch.float64)]).softmax(dim=0)


def test_a_request_is_weighed_by_how_far_experts_stand_out(routed: Any) -> None:
    library = seating(routed).library
    adapters = {name: library.get(name) for name in NAMES}
    detach(routed)
    expected = torch.stack([by_hand(routed, adapters, prompt) for prompt in PROMPTS[1::2]])
    moments = pooled_moments(routed, library, PROMPTS)
    attach(routed, library)
    prepare(routed, "contrast", moments)
    with routing(routed, {"preset": "contrast"}), torch.no_grad():
        with trace(routed) as traced:
            first = routed(input_ids=torch.tensor(PROMPTS[1::2]), use_cache=True)
            routed(input_ids=torch.tensor([[3], [4]]), past_key_values=first.past_key_values)
        weights = traced.stacked().double()
        padded = torch.tensor([[0, 0, *PROMPTS[1]], [0, 0, *PROMPTS[3]]])
        with trace(routed) as again:
            routed(input_ids=padded, attention_mask=(padded > 0).long())
    assert weights.shape[2] == 10
    assert torch.allclose(weights, expected[None, :, None].expand_as(weights), atol=1e-6)
    assert torch.allclose(again.stacked().double()[:, :, -1], weights[:, :, 0], atol=1e-6)


def test_prompts_that_tell_nothing_apart_are_refused_and_the_model_is_bare_again(routed: Any) -> None:
    library = seating(routed).library
    detach(routed)
    for prompts in (PROMPTS[:1], [PROMPTS[0], PROMPTS[0]]):
        with pytest.raises(TaskError, match="must differ, for deviations of their scores at model"):
            pooled_moments(routed, library, prompts)
    attach(routed, library)


def test_contrast_is_for_requests_and_says_what_it_needs(routed: Any) -> None:
    with pytest.raises(RouterError, match=r"'contrast' must be prepared(.|\n)*library prepare .* --router contrast"):
        routing(routed, "contrast").__enter__()
    with pytest.raises(RouterError, match=r"'contrast' can decide per \['request'\]"):
        Routing("contrast", per="layer")
    with pytest.raises(UsageError, match="a mean and a deviation above 0"):
        prepare(routed, "contrast", {"a": {"x": torch.tensor([0.0, 0.0])}})
