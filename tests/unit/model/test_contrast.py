"""Contrast: experts against what they score on everybody's prompts, held against its definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import RouterError, TaskError, UsageError
from lorary.formats.peft_config import new_config
from lorary.model.attach import attach, detach, routing
from lorary.model.prepare import prepare
from lorary.model.seating import seating
from lorary.model.trace import trace
from lorary.prepare.contrast import pooled_moments
from lorary.route.setting import Routing

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
        with pytest.raises(TaskError, match=r"must differ, for .* of the scores of expert 'a' at model"):
            pooled_moments(routed, library, prompts)
    attach(routed, library)


def test_contrast_is_for_requests_and_says_what_it_needs(routed: Any) -> None:
    with pytest.raises(RouterError, match=r"'contrast' must be prepared(.|\n)*library prepare .* --router contrast"):
        routing(routed, "contrast").__enter__()
    with pytest.raises(RouterError, match=r"'contrast' can decide per \['request'\]"):
        Routing.of("contrast", per="layer")
    with pytest.raises(UsageError, match="a mean and a deviation above 0"):
        prepare(routed, "contrast", {"a": {"x": torch.tensor([0.0, 0.0])}})


def weights_of(model: Any, **inputs: Any) -> Tensor:
    with routing(model, {"preset": "contrast"}), trace(model) as traced, torch.no_grad():
        model(**inputs)
    return traced.stacked()[0, :, 0].double()


def test_company_and_the_order_of_experts_and_prompts_change_nothing(routed: Any, route: Make) -> None:
    library = seating(routed).library
    adapters = [library.get(name) for name in NAMES]
    detach(routed)
    other = seating(route(routed, adapters[::-1])).library
    detach(routed)
    moments, turned = pooled_moments(routed, library, PROMPTS), pooled_moments(routed, other, PROMPTS[::-1])
    for name, by_path in moments.items():
        assert all(torch.allclose(turned[name][path], own, rtol=1e-12) for path, own in by_path.items())
    attach(routed, library)
    prepare(routed, "contrast", moments)
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    together = weights_of(routed, input_ids=padded, attention_mask=(padded > 0).long())
    alone = torch.cat([weights_of(routed, input_ids=torch.tensor([prompt])) for prompt in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-6)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


def test_an_answer_keeps_the_weights_of_its_prompt(routed: Any) -> None:
    library = seating(routed).library
    moments = pooled_moments(detach(routed), library, PROMPTS)
    attach(routed, library)
    prepare(routed, "contrast", moments)
    ids = torch.tensor(PROMPTS[1::2])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with routing(routed, {"preset": "contrast"}), trace(routed) as traced:
        routed.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    found = traced.stacked()
    assert found.shape[2] == 12
    assert torch.equal(found, found[:1, :, :1].expand_as(found))


@pytest.mark.parametrize("default", [{"allow": ["a"]}, {"per": "request"}, {"general": ["b"]}])
def test_the_yardstick_is_that_of_all_experts_whatever_the_library_routes_by(
    routed: Any, default: dict[str, Any]
) -> None:
    library = seating(routed).library
    detach(routed)
    expected = pooled_moments(routed, library, PROMPTS)
    library.set_default_router({"router": "arrow", "top_k": 4, "temperature": 1.0, "mix": "outputs", **default})
    found = pooled_moments(routed, library, PROMPTS)
    for name, by_path in expected.items():
        assert all(torch.equal(found[name][path], own) for path, own in by_path.items())


def test_layers_that_no_request_is_decided_by_need_no_yardstick(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    adapters = []
    for name in "ab":
        adapter = random_adapter(model, name, generator)
        lora_b, lora_a = (torch.randn(shape, generator=generator) for shape in ((300, 3), (3, 32)))
        modules = {**adapter.modules, "lm_head": LoraFactors(lora_a, lora_b, 2.0)}
        config = new_config(None, rank=3, alpha=6, target_modules=sorted(modules))
        adapters.append(Adapter(name, modules, config))
    library = seating(route(model, adapters)).library
    moments = pooled_moments(detach(model), library, PROMPTS)
    assert moments["a"]["lm_head"].tolist() == [0.0, 1.0]
    attach(model, library)
    prepare(model, "contrast", moments)
    weights = weights_of(model, input_ids=torch.tensor(PROMPTS[1::2]))
    assert torch.allclose(weights.sum(dim=1), torch.ones(2, dtype=torch.float64))
