"""Prompts that the model is given in pieces: decided by the whole prompt, traced once, answered as in one piece."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorary.errors import UsageError
from lorary.model.attach import detach, routing
from lorary.model.seating import seating
from lorary.model.trace import Trace, trace

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (2, 7), generator=torch.Generator().manual_seed(11))
PADDED = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
SETTINGS = ["arrow", "norm", "logo", {"per": "token"}, {"per": "request"}, [{"experts": ["b"]}, {"per": "request"}]]
REQUEST = {"per": "request", "temperature": 0.05}


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = tiny_model(dtype=torch.float64)
    return route(model, [random_adapter(model, name, generator) for name in "abcd"], top_k=2)


def generate(model: Any, ids: Tensor = IDS, mask: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Tokens and the logits of every step."""
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, do_sample=False, max_new_tokens=5,
        min_new_tokens=5, output_logits=True, return_dict_in_generate=True, pad_token_id=0, **settings,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits)


def is_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], rtol=1e-9, atol=1e-9)


def traced(model: Any, **settings: Any) -> tuple[tuple[Tensor, Tensor], Trace]:
    with trace(model) as record:
        found = generate(model, **settings)
    return found, record


@pytest.mark.parametrize("mask", [torch.ones_like(PADDED), PADDED])
@pytest.mark.parametrize(
    ("setting", "size"), [*((setting, 3) for setting in SETTINGS), *(({"per": "request"}, size) for size in (1, 7, 9))]
)
def test_a_prompt_in_chunks_is_answered_as_in_one_piece(routed: Any, setting: Any, size: int, mask: Tensor) -> None:
    with routing(routed, setting):
        whole, expected = traced(routed, mask=mask)
        chunked, found = traced(routed, mask=mask, prefill_chunk_size=size)
        assert is_same(chunked, whole)
        assert is_same(generate(routed, mask=mask), whole)  # and nothing is left behind
        kept = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], dim=1).bool()
        assert torch.equal(found.mask(), kept)
        assert torch.allclose(found.stacked()[:, kept], expected.stacked()[:, kept], atol=1e-6)


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}, STATIC])
def test_beams_and_other_caches_take_chunks_too(routed: Any, more: dict[str, Any]) -> None:
    with routing(routed, REQUEST):
        whole, chunked = generate(routed, **more), generate(routed, **more, prefill_chunk_size=3)
    assert torch.equal(chunked[0], whole[0])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("size", [None, 2])
def test_a_cache_that_holds_a_part_of_the_prompt_changes_no_decision(routed: Any, kind: str, size: int | None) -> None:
    def filled() -> Any:
        cache = (
            transformers.StaticCache(routed.config, max_cache_len=16)
            if kind == "static"
            else transformers.DynamicCache(config=routed.config)
        )
        routed(input_ids=IDS[:, :3], use_cache=True, past_key_values=cache)
        return cache

    more = {"disable_compile": True, "prefill_chunk_size": size}
    with routing(routed, REQUEST):
        whole = generate(routed)
        own, (found, record) = filled(), traced(routed, past_key_values=filled(), **more)
        assert is_same(found, whole)
        assert record.stacked().shape[2] == 11
        with routing(routed, "base"):
            foreign = filled()
        assert is_same(generate(routed, past_key_values=foreign, **more), whole)
        assert is_same(generate(routed, past_key_values=copy.deepcopy(own), **more), whole)


def test_a_conversation_goes_on_as_without_a_cache(routed: Any) -> None:
    with routing(routed, REQUEST):
        cache = transformers.DynamicCache(config=routed.config)
        first = generate(routed, past_key_values=cache)[0]
        more = torch.cat([first, IDS.flip(1)], dim=1)
        assert is_same(generate(routed, more, past_key_values=cache), generate(routed, more))


def test_two_requests_that_take_turns_keep_their_decisions(routed: Any) -> None:
    def start(ids: Tensor) -> Any:
        return routed(input_ids=ids, use_cache=True).past_key_values

    def step(cache: Any, ids: Tensor) -> Tensor:
        found: Tensor = routed(input_ids=ids, past_key_values=cache).logits
        return found

    one, other, last = IDS, IDS.flip(1), IDS[:, :1]
    with torch.no_grad(), routing(routed, REQUEST):
        expected = [step(start(ids), last) for ids in (one, other)]
        caches = [start(one), start(other)]
        copied = copy.deepcopy(caches[0])
        assert torch.equal(step(caches[0], last), expected[0])
        assert torch.equal(step(caches[1], last), expected[1])
        assert torch.equal(step(copied, last), expected[0])
    assert not torch.allclose(expected[0], expected[1])


def test_a_cache_of_other_settings_is_refused_where_the_prompt_is_not_there(routed: Any) -> None:
    with torch.no_grad(), routing(routed, "arrow"):
        cache = routed(input_ids=IDS[:, :3], use_cache=True).past_key_values
    with routing(routed, REQUEST):
        routed(input_ids=IDS)  # a decision for another request is no decision for this one
        with pytest.raises(UsageError, match="per='request' needs a pass over the prompt"):
            routed(input_ids=IDS[:, 3:], past_key_values=cache)


def test_an_assistants_rejected_drafts_are_not_traced(routed: Any, tiny_model: Make) -> None:
    assistant, one = tiny_model(seed=1, dtype=torch.float64), IDS[:1]
    for setting in ("arrow", REQUEST):
        with routing(routed, setting):
            plain, expected = traced(routed, ids=one)
            found, record = traced(routed, ids=one, assistant_model=assistant)
            assert torch.equal(found[0], plain[0])
            wanted, ours = expected.stacked(), record.stacked()
            assert ours.shape[2] - wanted.shape[2] in range(6)  # what the last pass drafted is not forgotten by anyone
            assert torch.allclose(ours[:, :, : wanted.shape[2]], wanted, atol=1e-6)


def test_nothing_is_left_on_the_model_and_copies_decide_for_themselves(routed: Any) -> None:
    with routing(routed, REQUEST):
        expected = generate(routed, prefill_chunk_size=3)
        other = copy.deepcopy(routed)
        with routing(routed, "base"):
            assert is_same(generate(other, prefill_chunk_size=3), expected)
            assert not is_same(generate(routed, prefill_chunk_size=3), expected)
    assert "_prefill" not in vars(routed)
    detach(other)
    assert "_prefill" not in vars(other)
    assert seating(routed).pass_handles == []


FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "MambaConfig": ({"state_size": 4}, ("in_proj", "out_proj")),
    "Mamba2Config": ({"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}, ("in_proj",)),
    # Their heads call a decoder inside of the model that has no head.
    "OPTConfig": ({"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}, ("q_proj", "v_proj")),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_other_families_remember_goes_on_with_its_request(
    family: str, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    fields, targets = FAMILIES[family]
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, family)(**{**shape, **fields})
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    route(model, [random_adapter(model, name, generator, targets=targets) for name in "abc"], top_k=2)
    with routing(model, REQUEST):
        cached, record = traced(model, ids=IDS[:1])
        uncached = generate(model, IDS[:1], use_cache=False)
    weights = record.stacked()
    assert torch.equal(weights, weights[:, :, :1].expand_as(weights))
    assert torch.equal(cached[0], uncached[0])
    assert torch.allclose(cached[1], uncached[1], atol=1e-4)
