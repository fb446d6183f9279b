"""Layers that are given the tokens of all rows along one axis (OPT's feed-forward) are routed as any other."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from lorary.errors import RouterError
from lorary.lora.flattened import ROWS, note_rows
from lorary.model.attach import detach, routing
from lorary.model.trace import trace
from lorary.model.verdict import verdict_of

Make = Callable[..., Any]
IDS = torch.randint(2, 300, (3, 6), generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
FLAT = [f"model.decoder.layers.{number}.{name}" for number in (0, 1) for name in ("fc1", "fc2")]
SETTINGS: list[Any] = [
    "arrow", "norm", "lag", "uniform", {"per": "token"}, {"per": "request"}, "logo", {"experts": ["b"]},
    {"general": ["a"], "top_k": 1},
]  # fmt: skip


def make_opt() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = OPTConfig(
            vocab_size=300, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.2,
        )  # fmt: skip
        return OPTForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture
def routed(random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    model = make_opt()
    targets = ("q_proj", "fc1", "fc2")
    return route(model, [random_adapter(model, name, generator, targets=targets) for name in "abcd"], top_k=2)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, mask: Tensor = MASK) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return found


def test_flattened_layers_are_found_by_the_trial() -> None:
    assert list(verdict_of(make_opt()).flat) == FLAT


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_row_is_routed_alike_in_company_and_alone(routed: Any, setting: Any) -> None:
    with routing(routed, setting):
        together = logits(routed)
        for row, real in enumerate(MASK.bool()):
            alone = logits(routed, IDS[row, real][None], torch.ones(1, int(real.sum()), dtype=torch.int64))
            assert torch.allclose(alone[0], together[row, real], atol=1e-9)
        with trace(routed) as traced:
            logits(routed)
    if traced.layers:
        assert traced.stacked().shape == (6, 3, 6, 4)
        assert traced.weights(FLAT[0]).shape == (3, 6, 4)


def test_each_row_follows_its_own_setting(routed: Any) -> None:
    settings: list[Any] = ["base", {"per": "request"}, {"experts": ["b"]}]
    with routing(routed, settings):
        together = logits(routed)
        tokens = routed.generate(IDS, attention_mask=MASK, max_new_tokens=3, do_sample=False, prefill_chunk_size=2)
    for row, setting in enumerate(settings):
        with routing(routed, setting):
            ids, mask = IDS[row : row + 1], MASK[row : row + 1]
            assert torch.allclose(together[row], logits(routed, ids, mask)[0], atol=1e-9)
            own = routed.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
            assert torch.equal(tokens[row], own[0])


def test_copies_and_layers_computed_anew_know_the_rows(routed: Any) -> None:
    with routing(routed, {"per": "request"}):
        expected = logits(routed)
        assert torch.equal(logits(copy.deepcopy(routed)), expected)
        assert torch.equal(logits(pickle.loads(pickle.dumps(routed))), expected)

        def gradient() -> Tensor:
            routed.zero_grad()
            routed(input_ids=IDS, attention_mask=MASK, use_cache=False).logits.square().sum().backward()
            return routed.get_input_embeddings().weight.grad.clone()

        routed.get_input_embeddings().weight.requires_grad_()
        plain = gradient()
        routed.config.dropout = 0.0
        for module in routed.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        routed.train()
        routed.activation_checkpointing_enable({"use_reentrant": False})
        assert torch.allclose(gradient(), plain)


def test_tokens_that_are_not_those_of_the_pass_are_never_taken_for_rows(routed: Any) -> None:
    layer = routed.get_submodule(FLAT[0])
    with routing(routed, {"per": "request"}):
        logits(routed)
        with pytest.raises(RouterError, match=r"needs layers that are given \(batch, seq, d_in\)"):
            layer(torch.ones(18, 32, dtype=torch.float64))  # as many as the pass had, but called by itself
    detach(routed)
    assert not any(ROWS in vars(module) or module._forward_pre_hooks for module in routed.modules())


class Mixture(torch.nn.Module):
    """Two experts in a list, which are given some of the tokens each."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def test_layers_in_a_list_are_never_taken_to_be_given_all_rows() -> None:
    model = Mixture()
    assert note_rows(model, ["experts.0"]) == []
