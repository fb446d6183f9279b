"""When a router decides: once per token, once per request, and row by row."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import RouterError, UsageError
from lorary.model.attach import detach, routing
from lorary.model.probe import deciding_by, real_tokens
from lorary.model.seating import seating
from lorary.model.trace import trace

Make = Callable[..., Any]
IDS = torch.randint(1, 300, (3, 6), generator=torch.Generator().manual_seed(3))
FIRST = "model.layers.0.self_attn.q_proj"


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **inputs).logits
    return found


def stacked(model: Any, **inputs: Any) -> Tensor:
    with trace(model) as traced:
        logits(model, **inputs)
    return traced.stacked()


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator) -> Any:
    """Four experts; 'd' adapts the second layer only."""
    model = tiny_model(dtype=torch.float64)
    adapters = [random_adapter(model, name, generator) for name in "abc"]
    return route(model, [*adapters, random_adapter(model, "d", generator, layers=[1])], top_k=2)


# Per token.


def test_all_layers_do_as_the_first_one_decided_for_the_token(routed: Any) -> None:
    own = stacked(routed)
    with routing(routed, {"per": "token"}):
        shared = stacked(routed)
    assert torch.equal(shared[0], own[0])
    assert torch.equal(shared, shared[:1].expand_as(shared))
    assert not torch.allclose(own[1], own[0])
    assert (shared[..., 3] == 0).all()  # an expert that the deciding layer has not is out of reach


def test_another_layer_may_decide_and_those_before_it_are_the_base(routed: Any) -> None:
    layers = list(seating(routed).layers)
    with routing(routed, {"per": "token", "at": layers[3]}), trace(routed) as traced:
        logits(routed)
        logits(routed)  # nothing of one pass reaches the next
    assert traced.layers == layers[3:]
    assert traced.weights(layers[3])[..., 3].any()
    assert torch.equal(traced.weights(layers[4]), traced.weights(layers[3]))


def test_layers_that_see_other_tokens_are_refused(routed: Any) -> None:
    layers = seating(routed).layers
    layer = list(layers.values())[2].lora
    with routing(routed, {"per": "token"}):
        logits(routed)
        with pytest.raises(RouterError, match="all given the same tokens"):
            layer(torch.ones(5, layer.down.shape[1], dtype=torch.float64), torch.ones(5, 32, dtype=torch.float64))


# Per request.


def decided_by_hand(model: Any, ids: Tensor, mask: Tensor, router: str) -> Tensor:
    """(rows, experts): from the scores of every layer over the inputs that the bare base gives it."""
    from lorary.lora.gate import LayerInput

    inputs: dict[str, Tensor] = {}
    state = seating(model)
    with routing(model, "base"):
        handles = [
            model.get_submodule(path).register_forward_pre_hook(lambda _, args, p=path: inputs.update({p: args[0]}))
            for path in state.layers
        ]
        logits(model, ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    sums, counts = torch.zeros(len(ids), 4, dtype=torch.float64), torch.zeros(4)
    with routing(model, router):
        for path, layer in state.layers.items():
            x = inputs[path].flatten(0, 1)
            gate: Any = layer.lora.in_force.gate
            z, projections = x @ layer.lora.down[: layer.lora.num_ranks].mT, x @ layer.lora.prototypes.mT
            scores = gate.scores(LayerInput(x, z, projections, inputs[path].shape[:2])).view(*ids.shape, -1)
            mean = torch.stack([row[real.bool()].mean(dim=0) for row, real in zip(scores, mask, strict=True)])
            sums[:, list(layer.experts)] += mean
            counts[list(layer.experts)] += 1
    best = (sums / counts).topk(2, dim=1)
    return torch.zeros(len(ids), 4, dtype=torch.float64).scatter(1, best.indices, best.values.softmax(1))


@pytest.mark.parametrize("router", ["arrow", "projection", "norm"])
def test_a_request_is_decided_by_the_mean_over_real_tokens_and_layers(routed: Any, router: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    expected = decided_by_hand(routed, IDS, mask, router)
    with routing(routed, {"router": router, "per": "request"}):
        found = stacked(routed, attention_mask=mask)
    here = found[-1]  # (batch, seq, experts)
    assert torch.allclose(here, expected.float()[:, None].expand_as(here), atol=1e-6)


@pytest.mark.parametrize("at", [None, "model.layers.0.mlp.down_proj"])
def test_logo_decides_by_the_last_real_token_of_one_layer(routed: Any, tiny_model: Make, at: str | None) -> None:
    path = at or "model.layers.1.self_attn.q_proj"
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    state, bare, inputs = seating(routed), tiny_model(dtype=torch.float64), []
    bare.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    logits(bare, attention_mask=mask)
    x = inputs[0][torch.arange(3), torch.tensor([5, 5, 2])]  # (rows, d_in)
    norms = torch.zeros(3, 4, dtype=torch.float64)
    for position, name in enumerate(state.experts):
        factors = state.library.get(name).modules.get(path)
        if factors is not None:  # 'd' adapts the second layer only, and is out of reach from the first
            norms[:, position] = (x @ factors.delta().mT).norm(dim=1)
    best = norms.topk(2, dim=1)
    expected = torch.zeros_like(norms).scatter(1, best.indices, best.values / best.values.sum(1, keepdim=True))
    with routing(routed, {"router": "logo", "at": at}):
        found = stacked(routed, attention_mask=mask)
    last = found[-1]  # (batch, seq, experts)
    assert torch.allclose(last, expected.float()[:, None].expand_as(last), atol=1e-6)
    assert at is None or not last[..., 3].any()


def test_a_request_keeps_its_decision_while_it_is_answered(routed: Any) -> None:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for cache in (True, False):
        with routing(routed, {"per": "request"}), trace(routed) as traced:
            routed.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=cache, **settings)
        weights = traced.weights(FIRST)
        assert torch.equal(weights, weights[:, :1].expand_as(weights))
        assert weights.shape[1] == (10 if cache else sum(range(6, 11)))


def test_each_new_prompt_is_decided_anew(routed: Any) -> None:
    with routing(routed, {"per": "request"}):
        first, other = logits(routed), logits(routed, IDS.flip(1))
        assert torch.equal(logits(routed), first)
        assert torch.equal(logits(routed, IDS.flip(1)), other)
        assert torch.equal(logits(routed, IDS[:1]), logits(routed, IDS[:1]))


def test_answers_behind_a_prompt_can_be_kept_out_of_the_decision(routed: Any) -> None:
    prompt = torch.zeros_like(IDS, dtype=torch.bool)
    prompt[:, :4] = True
    with routing(routed, {"per": "request"}):
        logits(routed, IDS[:, :4])
        expected = seating(routed).prober.requests[0].chosen.dense(4)  # type: ignore[union-attr]
        with deciding_by(seating(routed).prober, prompt):
            logits(routed)
        found = seating(routed).prober.requests[0].chosen.dense(4)  # type: ignore[union-attr]
    assert torch.allclose(found, expected, atol=1e-12)


def test_a_scored_answer_takes_no_part_in_the_decision(routed: Any) -> None:
    from lorary.data.template import Example
    from lorary.evaluate.loglik import answer_losses

    prompts = [(5, 6, 7, 8), (9, 10)]
    examples = [Example(prompt, (11, 12, 13), truncated=0) for prompt in prompts]
    with routing(routed, {"per": "request"}):
        losses = answer_losses(routed, examples)
        decided = []
        for prompt in prompts:
            logits(routed, torch.tensor([prompt]))
            decided.append(seating(routed).prober.requests[0].chosen.dense(4)[0])  # type: ignore[union-attr]
    for example, weights, found in zip(examples, decided, losses, strict=True):
        with routing(routed, {"experts": dict(zip("abcd", weights.tolist(), strict=True))}):
            assert found.total == pytest.approx(answer_losses(routed, [example])[0].total, rel=1e-9)


def test_a_pass_that_goes_on_with_nothing_is_refused(routed: Any) -> None:
    cache = routed(input_ids=IDS[:, :3], use_cache=True).past_key_values
    with (
        routing(routed, {"per": "request"}),
        pytest.raises(UsageError, match=r"nothing is decided, a pass of 3 rows\nremedy: begin without a cache"),
    ):
        logits(routed, IDS[:, 3:], past_key_values=cache)
    with routing(routed, {"per": "request"}):
        logits(routed)  # and the model goes on working


def test_a_row_of_padding_alone_is_refused(routed: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with (
        routing(routed, {"per": "request"}),
        pytest.raises(UsageError, match="each row must have a token to decide by"),
    ):
        logits(routed, attention_mask=mask)


def test_real_tokens_are_read_from_any_mask() -> None:
    rows = torch.tensor([[True, True, False], [False, True, True]])
    full = torch.ones(3, 3, dtype=torch.bool).tril() & rows[:, None, None, :]
    added = torch.zeros(full.shape).masked_fill(~full, -1e9)
    ids = torch.ones(2, 3, dtype=torch.long)
    for mask in (rows, rows.long(), full, added, {"full_attention": full}, torch.nn.functional.pad(full, (0, 4))):
        assert torch.equal(real_tokens({"input_ids": ids, "attention_mask": mask}), rows)
    assert real_tokens({"inputs_embeds": torch.ones(2, 3, 8)}).all()
    with pytest.raises(UsageError, match="must tell padding from the attention mask"):
        real_tokens({"input_ids": ids, "attention_mask": "causal"})


def test_probes_leave_no_hook_behind_and_follow_copies(routed: Any) -> None:
    with routing(routed, {"per": "request"}):
        found = logits(routed)
        other = copy.deepcopy(routed)
        with routing(routed, "base"):
            assert torch.allclose(logits(other), found)
            assert not torch.allclose(logits(routed), found)
        assert other.model._forward_pre_hooks
    assert not routed.model._forward_pre_hooks
    assert detach(other) is other
    assert not other.model._forward_pre_hooks


# Row by row.


SETTINGS: list[Any] = [{"experts": ["b"]}, "arrow", "base"]


def test_each_row_is_routed_by_its_own_setting(routed: Any) -> None:
    with routing(routed, SETTINGS):
        together = logits(routed)
    for row, setting in enumerate(SETTINGS):
        with routing(routed, setting):
            assert torch.allclose(together[row], logits(routed, IDS[row : row + 1])[0], atol=1e-9)


def test_rows_may_differ_in_everything_but_the_mix(routed: Any) -> None:
    settings: list[Any] = [
        {"router": "norm", "per": "request", "top_k": 1},
        {"router": "projection", "per": "token", "allow": ["a", "d"]},
        {"router": "lag", "input_norm": "unit", "scale": "unit"},
    ]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    with routing(routed, settings):
        together = logits(routed, attention_mask=mask)
    for row, setting in enumerate(settings):
        with routing(routed, setting):
            alone = logits(routed, IDS[row : row + 1], attention_mask=mask[row : row + 1])[0]
        real = mask[row].bool()
        assert torch.allclose(together[row, real], alone[real], atol=1e-9)


@pytest.mark.parametrize("per", ["layer", "request"])
def test_rows_are_expanded_for_beams_and_samples(routed: Any, per: str) -> None:
    settings: list[Any] = ["base", {"experts": ["a"]}, {"router": "arrow", "per": per}]
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    with routing(routed, settings):
        together = routed.generate(IDS, attention_mask=torch.ones_like(IDS), **how)
    for row, setting in enumerate(settings):
        with routing(routed, setting):
            ids = IDS[row : row + 1]
            assert torch.equal(routed.generate(ids, attention_mask=torch.ones_like(ids), **how)[0], together[row])


@pytest.mark.parametrize("per", ["layer", "token", "request"])
def test_the_base_as_a_candidate_has_a_place_beside_all_experts(routed: Any, per: str) -> None:
    wanted = {"per": per, "top_k": 9, "null": 0.3}
    with routing(routed, wanted):
        expected = stacked(routed)
    with routing(routed, [wanted, "base", wanted]):
        found = stacked(routed)
    assert torch.equal(found[:, ::2], expected[:, ::2])
    assert (expected.sum(dim=-1) < 0.999).all()
    assert not found[:, 1].any()


def test_a_wrong_number_of_rows_is_refused_once_and_clearly(routed: Any) -> None:
    with routing(routed, ["arrow", "base"]), pytest.raises(UsageError, match="2 settings for 3 rows"):
        logits(routed)
    with routing(routed, [{"per": "request"}, "base"]), pytest.raises(UsageError, match="2 settings for 3 rows"):
        logits(routed)
    logits(routed)


def test_rows_nest_and_end_with_their_block(routed: Any) -> None:
    arrow = logits(routed)
    with routing(routed, SETTINGS):
        rows = logits(routed)
        with routing(routed, "uniform"):
            uniform = logits(routed)
        assert torch.equal(logits(routed), rows)
    assert torch.equal(logits(routed), arrow)
    with routing(routed, ["uniform"]):  # one setting stands for all rows
        assert torch.allclose(logits(routed), uniform, atol=1e-9)


def test_a_model_moves_with_rows_and_decisions_in_force(routed: Any) -> None:
    with routing(routed, [{"per": "request"}, {"per": "token"}, {"router": "norm"}]):
        routed.to("meta")
        tensors = [t for layer in seating(routed).layers.values() for t in layer.lora.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
