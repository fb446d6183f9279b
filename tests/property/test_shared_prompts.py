"""Answers scored together, their prompts computed once, lose what each loses alone: bare or routed, in any model."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

from lorary.data.template import Example
from lorary.errors import UsageError
from lorary.evaluate.loglik import answer_losses
from lorary.model.attach import routing

Make = Callable[..., Any]
SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "initializer_range": 0.2}
SHARING = {
    "LlamaConfig": GROUPED,
    "Qwen3Config": GROUPED,
    "Gemma3TextConfig": {**GROUPED, "sliding_window": 64},
    "GPT2Config": GPT,
    "GPTNeoXConfig": SHAPE,
}
# Attention that reaches less far than the rows, and no attention: rows stay alone.
APART = {
    "MistralConfig": {**GROUPED, "sliding_window": 8},
    "MambaConfig": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
}
ROUTERS = ("arrow", "projection", "norm", "uniform", "base", {"router": "arrow", "per": "token"})
APART_ROUTERS = ({"router": "arrow", "per": "request"}, ["arrow", "base"], ["uniform"])


def make(config: str, fields: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields))
    return model.requires_grad_(False).eval()


def some_rows(generator: torch.Generator, options: int = 4) -> list[Example]:
    """Three questions of one instruction with four options each, some of which begin alike, in no order."""

    def ids(number: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 300, (number,), generator=generator).tolist())

    start, rows = ids(6), []
    for question in range(3):
        prompt, option = start + ids(9 + 4 * question), ids(2)
        rows += [Example(prompt, option[: i % 3] + ids(1 + i % 3), 0) for i in range(options)]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)]


@torch.no_grad()
def losses_alone(model: Any, rows: Sequence[Example]) -> list[list[float]]:
    """Nats of each target token, every row by itself."""
    found = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.target_ids]])
        logits = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        first = len(row.prompt_ids) - 1
        found.append([-float(logits[first + i, token]) for i, token in enumerate(row.target_ids)])
    return found


class Fed:
    """Counts the tokens that a model is given, the short passes that find out about sharing left out."""

    def __init__(self, model: Any, rows: Sequence[Example]) -> None:
        answer_losses(model, rows[:1])
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _module: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.tokens += args[0].numel()


def check(model: Any, rows: Sequence[Example], expected: Sequence[Sequence[float]]) -> None:
    for loss, own in zip(answer_losses(model, rows, max_tokens=128), expected, strict=True):
        assert loss.total == pytest.approx(sum(own), rel=1e-5)
        assert loss.eos == pytest.approx(own[-1], rel=1e-4)
        assert loss.num_tokens == len(own)


@pytest.mark.parametrize("config", [*SHARING, *APART])
def test_rows_lose_together_what_they_lose_alone(
    config: str, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model, rows = make(config, {**SHARING, **APART}[config]), some_rows(generator)
    fed = Fed(model, rows)
    bare = losses_alone(model, rows)
    fed.tokens = 0
    check(model, rows, bare)
    num_alone = sum(len(row.prompt_ids) + len(row.target_ids) - 1 for row in rows)
    assert (fed.tokens < 0.5 * num_alone) is (config in SHARING)
    if config == "MambaConfig":
        return
    experts = [random_adapter(model, name, generator, targets=("all-linear",)) for name in "abc"]
    routed = route(model, experts, router="arrow", top_k=2)
    alone = losses_alone(routed, rows)
    assert max(abs(sum(a) - sum(b)) for a, b in zip(alone, bare, strict=True)) > 0.1
    check(routed, rows, alone)


@pytest.mark.parametrize("setting", ROUTERS, ids=str)
def test_a_router_that_decides_token_by_token_does_not_mind_company(
    setting: Any, tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model, rows = tiny_model(), some_rows(generator)
    routed = route(model, [random_adapter(model, name, generator) for name in "abcd"], top_k=2)
    fed = Fed(routed, rows)
    with routing(routed, setting):
        alone = losses_alone(routed, rows)
        fed.tokens = 0
        check(routed, rows, alone)
    assert fed.tokens < 150


@pytest.mark.parametrize("setting", APART_ROUTERS, ids=str)
def test_decisions_for_rows_keep_them_apart(
    setting: Any, tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model, rows = tiny_model(), some_rows(generator)
    routed = route(model, [random_adapter(model, name, generator) for name in "abcd"], top_k=2)
    answer_losses(routed, rows, max_tokens=64)  # finds out that this model may share, which a router by tokens may
    own = setting if isinstance(setting, list) else [setting]
    alone = []
    for number, row in enumerate(rows):
        with routing(routed, own[number * len(own) // len(rows)]):
            alone.append(answer_losses(routed, [row])[0])
    with routing(routed, setting):
        together = answer_losses(routed, rows, max_tokens=64)
    for one, other in zip(together, alone, strict=True):
        assert one.total == pytest.approx(other.total, rel=1e-5)


def test_settings_that_rows_cannot_share_out_are_refused(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model, rows = tiny_model(), some_rows(generator)
    routed = route(model, [random_adapter(model, name, generator) for name in "ab"])
    with routing(routed, ["arrow", "base"]), pytest.raises(UsageError, match="one row for each routing setting"):
        answer_losses(routed, rows[:5])


def test_an_answer_is_greedy_if_each_token_of_it_is_the_likeliest(tiny_model: Make, generator: torch.Generator) -> None:
    model, (row, *others) = tiny_model(), some_rows(generator)
    ids = list(row.prompt_ids)
    for _ in range(3):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    likeliest = Example(row.prompt_ids, tuple(ids[-3:]), 0)
    almost = Example(row.prompt_ids, (*ids[-3:-1], ids[-1] + 1), 0)
    found = answer_losses(model, [almost, likeliest, *others])
    assert [loss.is_greedy for loss in found[:2]] == [False, True]
