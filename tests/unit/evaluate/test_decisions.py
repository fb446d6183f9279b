"""Decisions for whole requests are taken once per prompt, and rows that are decided alike are scored together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorary.evaluate.decisions import asks_base, decide, decides_once
from lorary.model.attach import routing
from lorary.model.fallback import Evidence
from lorary.model.features import hidden_embedding, last_vectors, prompt_vectors
from lorary.model.prepare import prepare
from lorary.model.seating import seating
from lorary.route.setting import Routing

Make = Callable[..., Any]
NAMES = ("a", "b", "c")
PROMPTS = [(5, 9, 2, 7), (11, 3), (8, 8, 1, 4, 6, 2), (5, 9, 2, 7)]


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Of each of the first two prompts an expert of its own; the third is like none."""
    model = tiny_model(dtype=torch.float64)
    routed = route(model, [random_adapter(model, name, generator, rank=2) for name in NAMES], top_k=2)
    noise = 1e-3 * torch.randn(3, 6, 32, generator=generator, dtype=torch.float64)
    with routing(routed, "base"), torch.no_grad():
        means = prompt_vectors(routed, hidden_embedding, PROMPTS[:2])
    vectors = [*means, torch.randn(32, generator=generator, dtype=torch.float64)]
    prepare(routed, "samples_early", {n: {"request": v + e} for n, v, e in zip(NAMES, vectors, noise, strict=True)})
    return routed


def test_each_prompt_has_the_decision_that_a_pass_of_it_alone_takes(routed: Any) -> None:
    with routing(routed, "auto"):
        assert decides_once(routed)
        decided = decide(routed, PROMPTS)
    assert [decision.weights for decision in decided[:2]] == [(("a", 1.0),), (("b", 1.0),)]
    assert decided[2].is_lost
    assert [name for name, _ in decided[2].weights] == list(NAMES)
    assert decided[3] == decided[0]
    for prompt, decision in zip(PROMPTS, decided, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            with routing(routed, "auto"):
                expected = routed(input_ids=ids).logits
            with routing(routed, decision.setting(Routing.of("auto"))):
                assert torch.allclose(routed(input_ids=ids).logits, expected, atol=1e-10)


def test_equal_prompts_are_looked_at_once(routed: Any) -> None:
    passes: list[int] = []
    handle = routed.model.layers[0].register_forward_hook(lambda _m, args, _o: passes.append(len(args[0])))
    with routing(routed, "auto"):
        decide(routed, PROMPTS * 5)
    handle.remove()
    assert sum(passes) == 3


def test_a_decision_is_forgotten_before_the_next_pass(routed: Any) -> None:
    with routing(routed, "auto"), torch.no_grad():
        decide(routed, PROMPTS[:1])
        found = routed(input_ids=torch.tensor([PROMPTS[1]])).logits
    with routing(routed, {"experts": ["b"]}), torch.no_grad():
        assert torch.allclose(found, routed(input_ids=torch.tensor([PROMPTS[1]])).logits, atol=1e-10)


def test_the_base_answers_where_there_is_no_fallback(routed: Any) -> None:
    with routing(routed, {"router": "auto", "fallback": None}):
        lost = decide(routed, PROMPTS)[2]
    assert (lost.weights, lost.setting(Routing.of("auto"))) == ((), Routing("base"))


def test_the_base_is_asked_in_its_own_template_only_where_that_is_the_fallback(routed: Any) -> None:
    with routing(routed, "auto"):
        kept, _, lost, _ = decide(routed, PROMPTS)
    auto = Routing.of("auto", threshold=0.0, fallback="chat")
    assert asks_base(auto, lost)
    assert not asks_base(auto, kept)
    assert not asks_base(auto.changed(fallback="uniform"), lost)
    assert not asks_base(auto, replace(lost, prefers_mean=True))


def test_routers_of_tokens_and_of_single_rows_decide_on_their_own(routed: Any) -> None:
    assert not decides_once(routed)
    with routing(routed, ["auto", "base"]):
        assert not decides_once(routed)


def test_a_sentence_says_what_was_decided_and_by_which_rule(routed: Any) -> None:
    with routing(routed, "auto"):
        kept, _, lost, _ = decide(routed, PROMPTS)
    auto = Routing.of("auto", threshold=0.0, fallback="chat")
    assert kept.sentence(auto).startswith("auto, by discriminant: a 100% (score ")
    assert lost.sentence(auto).startswith("auto, by discriminant: no expert fits, and the mean of all experts answers")
    assert "the base answers" in lost.of_base().sentence(auto)


def test_evidence_is_followed_where_no_expert_fits_and_nowhere_else(routed: Any) -> None:
    """Its pass reads all rows of a batch; what it says of those that an expert fits depends on their company."""
    with routing(routed, "base"):
        vectors = last_vectors(routed, PROMPTS[:3])
    seating(routed).evidence = Evidence(vectors, torch.full((3,), 9.0))
    with routing(routed, "auto"):
        decisions = decide(routed, PROMPTS[:3])
    assert [decision.is_lost for decision in decisions] == [False, False, True]
    assert [decision.prefers_mean for decision in decisions] == [False, False, True]
