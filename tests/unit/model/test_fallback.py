"""Requests in which no expert reaches the threshold are answered by the fallback."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import RouterError, UsageError
from lorary.model.attach import routing
from lorary.model.live import remove_expert
from lorary.model.prepare import prepare
from lorary.model.seating import seating
from lorary.route.presets import in_units, merged, without_router
from lorary.route.setting import Routing

Make = Callable[..., Any]
NAMES = ("a", "b", "c")
IDS = torch.randint(1, 300, (4, 9), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def routed_by(model: Any, setting: Any, ids: Tensor = IDS) -> Tensor:
    with routing(model, setting):
        return logits(model, ids)


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model(dtype=torch.float64)
    return route(model, [random_adapter(model, name, generator, rank=2) for name in NAMES], top_k=2)


@pytest.fixture
def prepared(routed: Any) -> Any:
    """Of each of the first three rows an expert of its own; the fourth is like none of them."""
    with routing(routed, "base"), torch.no_grad():
        means = routed.model(input_ids=IDS, output_hidden_states=True).hidden_states[1].mean(dim=1)
    noise = 1e-3 * torch.randn(3, 6, means.shape[1], generator=torch.Generator().manual_seed(1), dtype=means.dtype)
    prepare(routed, "samples_early", {n: {"request": means[i] + noise[i]} for i, n in enumerate(NAMES)})
    return routed


@pytest.mark.parametrize("router", ["discriminant", "auto"])
def test_a_row_has_its_own_expert_and_a_foreign_one_all_of_them(prepared: Any, router: str) -> None:
    found = routed_by(prepared, router)
    for row, name in enumerate(NAMES):
        alone = routed_by(prepared, {"experts": [name]}, IDS[row : row + 1])
        assert torch.allclose(found[row : row + 1], alone, atol=1e-10)
    assert torch.allclose(found[3:], routed_by(prepared, "uniform", IDS[3:]), atol=1e-10)


def test_scores_say_how_sure_a_choice_is(prepared: Any) -> None:
    with routing(prepared, "auto"):
        logits(prepared)
        (request,) = seating(prepared).prober.requests
    assert torch.equal(request.scores.argmax(dim=1)[:3], torch.arange(3))
    assert (request.scores.amax(dim=1)[:3] > 0).all()
    assert request.scores[3].amax() < 0
    assert request.rule == "discriminant"


@pytest.mark.parametrize(
    ("fallback", "as_if"),
    [(None, "base"), ("uniform", "uniform"), ("b", {"experts": ["b"]})],
)
def test_the_fallback_answers_where_nothing_reaches_the_threshold(prepared: Any, fallback: Any, as_if: Any) -> None:
    setting = {"router": "discriminant", "threshold": 1e9, "fallback": fallback}
    assert torch.allclose(routed_by(prepared, setting), routed_by(prepared, as_if), atol=1e-10)


def test_rules_by_layers_fall_back_too(prepared: Any) -> None:
    setting = {"router": "projection", "per": "request", "threshold": 1e9, "fallback": "uniform"}
    assert torch.allclose(routed_by(prepared, setting), routed_by(prepared, "uniform"), atol=1e-10)
    some = {"router": "projection", "per": "request", "threshold": -1e9, "fallback": "uniform"}
    plain = {"router": "projection", "per": "request"}
    assert torch.equal(routed_by(prepared, some), routed_by(prepared, plain))


def test_a_fallback_keeps_to_the_experts_that_are_allowed(prepared: Any) -> None:
    setting = {"router": "auto", "threshold": 1e9, "allow": ["a", "c"]}
    expected = routed_by(prepared, {"experts": ["a", "c"]})
    assert torch.allclose(routed_by(prepared, setting), expected, atol=1e-10)


def test_generation_keeps_the_fallback_of_each_row(prepared: Any) -> None:
    with routing(prepared, "auto"):
        found = prepared.generate(IDS, max_new_tokens=3, do_sample=False)
    for row, setting in ((0, {"experts": ["a"]}), (3, "uniform")):
        with routing(prepared, setting):
            alone = prepared.generate(IDS[row : row + 1], max_new_tokens=3, do_sample=False)
        assert torch.equal(found[row], alone[0])


def test_defaults_of_a_rule_come_and_go_with_it() -> None:
    auto = merged(Routing(), "auto")
    assert (auto.choosing.top_k, auto.choosing.threshold, auto.fallback) == (1, 0.0, "chat")
    assert merged(auto, "arrow") == Routing()
    assert merged(auto, {"top_k": 2}).choosing.top_k == 2
    assert merged(auto, {"experts": ["a"]}) == merged(Routing(), {"experts": ["a"]}).changed(router="auto")
    assert merged(Routing(), {"router": "auto", "fallback": None}).fallback is None
    assert not {"top_k", "threshold", "fallback"} & set(without_router(auto))
    assert Routing.of(**auto.to_json()) == auto
    assert in_units(auto.changed(fallback=None)) == {"auto": {"threshold": 0.0, "top_k": 1, "fallback": None}}
    assert in_units(Routing()) == {}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"router": "arrow", "fallback": "uniform"}, UsageError),
        ({"router": "arrow", "per": "request", "fallback": "uniform"}, UsageError),
        ({"router": "contrast", "threshold": 0.0, "fallback": ""}, UsageError),
        ({"router": "contrast", "threshold": 0.0, "fallback": "a", "allow": ["b"]}, RouterError),
    ],
)
def test_a_fallback_that_could_never_answer_is_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="fall"):
        Routing.of(**fields)


def test_a_fallback_must_be_seated(prepared: Any) -> None:
    with pytest.raises(RouterError, match="fall back on"), routing(prepared, {"router": "auto", "fallback": "zzz"}):
        pass


def test_rows_with_settings_of_their_own_fall_back_too(prepared: Any) -> None:
    settings = [{"experts": ["b"]}, {"router": "auto", "threshold": 1e9}, "base", "auto"]
    found = routed_by(prepared, settings)
    for row, as_if in enumerate([{"experts": ["b"]}, "uniform", "base", "uniform"]):
        alone = routed_by(prepared, as_if, IDS[row : row + 1])
        assert torch.allclose(found[row : row + 1], alone, atol=1e-10)


def test_experts_that_may_not_be_chosen_play_no_part(prepared: Any) -> None:
    """Else a request of a masked expert's kind would be told as foreign by that expert's own prompts."""
    found = {}
    for setting in ({"allow": ["a", "b"]}, {"general": ["c"]}):
        with routing(prepared, {"router": "discriminant", **setting}):
            logits(prepared)
            found[str(setting)] = seating(prepared).prober.requests[0].scores
    remove_expert(prepared, "c")
    with routing(prepared, "discriminant"):
        logits(prepared)
        without = seating(prepared).prober.requests[0].scores
    for scores in found.values():
        assert torch.allclose(scores[:, :2], without, rtol=1e-8)
        assert (scores[:, 2] == -torch.inf).all()
