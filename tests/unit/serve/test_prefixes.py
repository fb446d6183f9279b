"""Beginnings of prompts, by what computed them."""

from typing import Any

import torch
from tests.support.adapters import as_dora, with_biases

from lorary.adapter import Adapter
from lorary.model.live import add_expert, replace_expert
from lorary.model.seating import seating
from lorary.route.setting import General, Routing
from lorary.serve.prefixes import STRIDE, PrefixCache, computed_by, contents
from lorary.serve.row_cache import RowStates

HASHES = {"a": "1", "b": "2"}


def states(length: int, value: float) -> RowStates:
    return [(torch.full((1, 1, length, 1), value), torch.full((1, 1, length, 1), value)), None]


def test_the_longest_known_beginning_is_found_and_a_token_is_left_to_compute() -> None:
    cache = PrefixCache(1000)
    ids = tuple(range(3 * STRIDE))
    cache.keep(b"x", ids, states(len(ids), 1.0))
    for length, expected in ((3 * STRIDE, 2), (3 * STRIDE - 1, 2), (2 * STRIDE + 1, 2), (2 * STRIDE, 1), (STRIDE, 0)):
        found = cache.find(b"x", ids[:length])
        assert (0 if found is None else found[1]) == expected * STRIDE
    assert cache.find(b"y", ids) is None
    assert cache.find(b"x", (7, *ids[1:])) is None
    found = cache.find(b"x", (*ids[: STRIDE + 3], *ids))
    assert found is not None
    (pair, nothing), length = found
    assert (pair is not None and pair[0].shape[2], nothing, length) == (STRIDE, None, STRIDE)


def test_what_was_not_asked_for_longest_is_forgotten_first() -> None:
    cache = PrefixCache(3 * STRIDE)
    prompts = [tuple(range(start, start + STRIDE)) for start in (0, 100, 200, 300)]
    for number, prompt in enumerate(prompts[:3]):
        cache.keep(b"x", prompt, states(STRIDE, number))
    assert cache.find(b"x", (*prompts[0], 1)) is not None
    cache.keep(b"x", prompts[3], states(STRIDE, 3.0))
    assert [cache.find(b"x", (*prompt, 1)) is not None for prompt in prompts] == [True, False, True, True]
    assert cache.num_tokens == 3 * STRIDE
    cache.keep(b"x", tuple(range(4 * STRIDE)), states(4 * STRIDE, 4.0))  # larger than all room
    assert cache.num_tokens == 3 * STRIDE
    cache.clear()
    assert cache.find(b"x", (*prompts[0], 1)) is None


def test_whatever_changes_an_answer_has_another_digest() -> None:
    settings = [
        Routing("arrow"),
        Routing.of("arrow", top_k=1),
        Routing("uniform"),
        Routing("base"),
        Routing(experts=["a"]),
        Routing(experts={"a": 2.0}),
        Routing(experts=["a", "b"]),
        Routing(experts=["a"], mix="factors"),
        Routing(experts=["a"], general=General(["b"])),
    ]
    digests = [computed_by(setting, HASHES) for setting in settings]
    assert len(set(digests)) == len(settings)
    changed = [computed_by(setting, {**HASHES, "b": "3"}) == d for setting, d in zip(settings, digests, strict=True)]
    assert changed == [False, False, False, True, True, True, False, True, False]


def test_a_decision_shares_with_the_expert_that_it_names() -> None:
    decided = Routing.of("arrow", per="request").changed(experts={"a": 1.0}, fallback=None)
    assert computed_by(decided, HASHES) == computed_by(Routing(experts=["a"]), HASHES)


def test_an_expert_that_came_live_has_a_hash_of_all_that_it_does(
    tiny_model: Any, random_adapter: Any, route: Any, generator: torch.Generator
) -> None:
    model = tiny_model()
    plain, late = (random_adapter(model, name, generator) for name in "ab")
    route(model, [plain], router="uniform")
    add_expert(model, late)
    hashes = [contents(seating(model))["b"]]
    for more in (as_dora(late, model, generator), as_dora(late, model, generator), with_biases(late, generator)):
        replace_expert(model, Adapter("b", more.modules, more.config))  # nothing of it was on disk
        hashes.append(contents(seating(model))["b"])
    assert len(set(hashes)) == 4
