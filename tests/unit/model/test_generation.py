"""Ways to generate: assisted, sampled, over a static cache; all of them give what plain generation gives."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.model.attach import detach, routing
from lorary.model.seating import seating

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (2, 7), generator=torch.Generator().manual_seed(11))
SETTINGS = pytest.mark.parametrize(
    "setting", ["arrow", "norm", {"per": "token"}, {"per": "request"}, {"experts": ["b"]}]
)


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model(dtype=torch.float64)
    return route(model, [random_adapter(model, name, generator) for name in "abcd"], top_k=2)


def generate(model: Any, ids: Tensor = IDS, **settings: Any) -> Tensor:
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, **settings}
    found: Tensor = model.generate(ids, max_new_tokens=6, min_new_tokens=6, **settings)
    return found[:, ids.shape[1] :]


@SETTINGS
@pytest.mark.parametrize("assistant", ["another", "the bare base", "itself"])
def test_an_assistant_changes_no_token(routed: Any, tiny_model: Make, setting: Any, assistant: str) -> None:
    assistants = {
        "another": lambda: tiny_model(seed=1, dtype=torch.float64),
        "the bare base": lambda: detach(copy.deepcopy(routed)),
        "itself": lambda: routed,
    }
    one = IDS[:1]
    with routing(routed, setting):
        assert torch.equal(generate(routed, one, assistant_model=assistants[assistant]()), generate(routed, one))


@pytest.mark.parametrize("num_drafted", [1, 4])
def test_a_request_is_not_decided_by_what_an_assistant_drafts(routed: Any, tiny_model: Make, num_drafted: int) -> None:
    assistant, one = tiny_model(seed=1, dtype=torch.float64), IDS[:1]
    assistant.generation_config.num_assistant_tokens = num_drafted
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    with routing(routed, {"per": "request"}):
        request = next(iter(seating(routed).layers.values())).lora.in_force.gate.request
        generate(routed, one)
        decided = request.chosen.weights
        generate(routed, one, assistant_model=assistant)
        assert torch.allclose(request.chosen.weights, decided, rtol=1e-9)
        routed(input_ids=torch.cat([one, one], dim=1))  # another prompt would have been told apart
        assert not torch.allclose(request.chosen.weights, decided, rtol=1e-3)


@SETTINGS
def test_sampling_with_a_seed_does_not_depend_on_the_cache(routed: Any, setting: Any) -> None:
    def sampled(seed: int, **settings: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return generate(routed, do_sample=True, temperature=2.0, **settings)

    with routing(routed, setting):
        first = sampled(0)
        assert torch.equal(sampled(0), first)
        assert torch.equal(sampled(0, use_cache=False), first)
        assert torch.equal(sampled(0, cache_implementation="static", disable_compile=True), first)
        assert not torch.equal(sampled(1), first)


def test_rows_keep_their_settings_over_a_static_cache_with_beams(routed: Any) -> None:
    settings: list[Any] = [{"experts": ["b"]}, {"per": "request"}]
    beams = {"num_beams": 2, "cache_implementation": "static", "disable_compile": True}
    with routing(routed, settings):
        together = generate(routed, **beams)
    for row, setting in enumerate(settings):
        with routing(routed, setting):
            assert torch.equal(generate(routed, IDS[row : row + 1], num_beams=2)[0], together[row])
