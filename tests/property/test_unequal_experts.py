"""Which scores compare experts of different ranks, sizes and layers fairly, and which do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.model.trace import trace
from lorary.ops.blocks import split_blocks
from lorary.route.arrow import arrow_prototypes, arrow_scores
from lorary.route.contrast import contrast_readout
from lorary.route.facts import expert_facts
from lorary.route.norm import norm_readout
from lorary.route.projection import projection_readout

Make = Callable[..., Any]
RANKS = (1, 1, 1, 16, 16, 16)
SIZES = (1.0, 50.0, 0.02, 1.0, 50.0, 0.02)
D_IN, D_OUT, TOKENS = 64, 48, 4000
SMALL, LARGE = slice(0, 3), slice(3, 6)


@pytest.fixture
def factors(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """lora_a and lora_b of three experts of rank 1 and three of rank 16, of three sizes each."""
    return [
        (torch.randn(rank, D_IN, generator=generator), size * torch.randn(D_OUT, rank, generator=generator))
        for rank, size in zip(RANKS, SIZES, strict=True)
    ]


@pytest.fixture
def tokens(generator: torch.Generator) -> Tensor:
    """Unit tokens of all directions."""
    x = torch.randn(TOKENS, D_IN, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


def readout(rule: Callable[..., Tensor], kind: str, factors: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Scores of a rule that reads small matrices on the low-rank buffer."""
    width = max(RANKS)
    stacked = []
    for lora_a, lora_b in factors:
        matrix = getattr(expert_facts(lora_a[None], lora_b[None]), kind)[0].float()
        stacked.append(torch.nn.functional.pad(matrix, (0, width - matrix.shape[1])))
    z = torch.cat([x @ lora_a.mT for lora_a, _ in factors], dim=1)
    alive = torch.ones(len(RANKS), dtype=torch.bool)
    return rule(z, split_blocks(RANKS, torch.cat(stacked)), alive)


def wins(scores: Tensor) -> Tensor:
    """(experts,) share of the tokens at which each is first."""
    return scores.argmax(dim=1).bincount(minlength=scores.shape[1]) / len(scores)


def test_arrow_prefers_no_rank_and_no_size(factors: list[tuple[Tensor, Tensor]], tokens: Tensor) -> None:
    prototypes = torch.cat([arrow_prototypes(lora_a[None], lora_b[None])[0] for lora_a, lora_b in factors]).float()
    share = wins(arrow_scores(tokens, prototypes))
    assert share.min() > 0.1
    assert share.max() < 0.25


def test_projection_prefers_large_ranks_and_contrast_takes_that_away(
    factors: list[tuple[Tensor, Tensor]], tokens: Tensor
) -> None:
    lengths = readout(projection_readout, "row_space", factors, tokens)
    assert wins(lengths)[LARGE].sum() > 0.9
    assert lengths[:, SMALL].mean() < lengths[:, LARGE].mean() / 2
    moments = torch.stack([lengths[: TOKENS // 2].mean(dim=0), lengths[: TOKENS // 2].std(dim=0)], dim=1)

    def calibrated(z: Tensor, blocks: Any, alive: Tensor) -> Tensor:
        return contrast_readout(z, blocks, alive, moments)

    share = wins(readout(calibrated, "row_space", factors, tokens[TOKENS // 2 :]))
    assert share.min() > 0.08
    assert share.max() < 0.3


def test_norm_prefers_large_updates_and_calibration_takes_that_away(
    factors: list[tuple[Tensor, Tensor]], tokens: Tensor
) -> None:
    norms = readout(norm_readout, "outputs", factors, tokens)
    assert wins(norms)[[1, 4]].sum() > 0.99
    moments = torch.stack([norms.mean(dim=0), norms.std(dim=0)], dim=1)

    def calibrated(z: Tensor, blocks: Any, alive: Tensor) -> Tensor:
        return norm_readout(z, blocks, alive, moments)

    share = wins(readout(calibrated, "outputs", factors, tokens))
    assert share.min() > 0.08
    assert share.max() < 0.3


def test_in_a_layer_that_one_expert_has_it_gets_the_whole_weight(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    model = tiny_model()
    few = random_adapter(model, "few", generator, targets=("q_proj",))
    many = random_adapter(model, "many", generator, targets=("q_proj", "down_proj"))
    route(model, [few, many])
    with trace(model) as traced, torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    alone = traced.weights("model.layers.0.mlp.down_proj")
    assert torch.equal(alone[..., 1], torch.ones_like(alone[..., 1]))
    shared = traced.weights("model.layers.0.self_attn.q_proj")
    assert ((shared > 0) & (shared < 1)).all()
    usage = traced.usage()
    assert usage["few"] == pytest.approx(float(torch.stack([
        traced.weights(f"model.layers.{number}.self_attn.q_proj")[..., 0].mean() for number in range(2)
    ]).mean()))  # fmt: skip
