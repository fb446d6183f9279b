"""The rules beyond Arrow equal their definitions on full matrices, read from the low-rank buffer alone."""

import pytest
import torch
from torch import Tensor

from lorary.ops.blocks import Block, block_norms, split_blocks
from lorary.ops.choose import Choice, choose
from lorary.ops.spectrum import low_rank_cores
from lorary.route import ROUTERS
from lorary.route.arrow import arrow_prototypes, arrow_readout
from lorary.route.facts import expert_facts, input_directions, tied_prototypes
from lorary.route.lag import lag_readout
from lorary.route.logo import last_tokens
from lorary.route.norm import norm_readout
from lorary.route.projection import projection_readout
from lorary.route.rule import Reading

TOKENS, D_IN, D_OUT = 7, 10, 6


def factors(rank: int, generator: torch.Generator, number: int = 3) -> tuple[Tensor, Tensor]:
    lora_a = torch.randn(number, rank, D_IN, generator=generator, dtype=torch.float64)
    return lora_a, torch.randn(number, D_OUT, rank, generator=generator, dtype=torch.float64)


def blocks(matrices: Tensor) -> list[Block]:
    number, rank = matrices.shape[0], matrices.shape[2]
    return split_blocks([rank] * number, matrices.reshape(number * rank, rank))


@pytest.mark.parametrize("rank", [1, 4, 8, 12])  # below, between and above d_out and d_in
def test_projection_and_norm_equal_those_of_the_full_update(rank: int, generator: torch.Generator) -> None:
    lora_a, lora_b = factors(rank, generator)
    x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64)
    z = (x @ lora_a.flatten(0, 1).mT).contiguous()
    facts, alive = expert_facts(lora_a, lora_b), torch.ones(3, dtype=torch.bool)
    updates = lora_b @ lora_a
    directions = torch.linalg.svd(updates).Vh[:, : min(rank, D_OUT)]
    lengths = torch.einsum("td,ekd->tek", x, directions).norm(dim=-1)
    assert torch.allclose(projection_readout(z, blocks(facts.row_space), alive), lengths, rtol=1e-8)
    norms = torch.einsum("td,eod->teo", x, updates).norm(dim=-1)
    assert torch.allclose(norm_readout(z, blocks(facts.outputs), alive), norms, rtol=1e-10)


def test_directions_that_an_update_has_not_are_left_out_of_its_projection(generator: torch.Generator) -> None:
    lora_a, lora_b = factors(2, generator)
    # The same updates in factors of rank 4: once with dependent rows, once with columns of zeros.
    doubled = torch.cat([lora_a, lora_a], dim=1), torch.cat([lora_b, lora_b], dim=2) / 2
    padded = torch.cat([lora_a, torch.randn_like(lora_a)], dim=1), torch.cat([lora_b, torch.zeros_like(lora_b)], dim=2)
    x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64)
    alive = torch.ones(3, dtype=torch.bool)

    def scores(lora_a: Tensor, lora_b: Tensor) -> Tensor:
        z = x @ lora_a.flatten(0, 1).mT
        return projection_readout(z, blocks(expert_facts(lora_a, lora_b).row_space), alive)

    for a, b in (doubled, padded):
        assert torch.allclose(scores(a, b), scores(lora_a, lora_b), rtol=1e-6)


def test_the_first_row_of_the_row_space_reads_arrows_projection(generator: torch.Generator) -> None:
    lora_a, lora_b = factors(4, generator)
    x = torch.randn(TOKENS, D_IN, generator=generator, dtype=torch.float64)
    cores = low_rank_cores(lora_a, lora_b)
    z = torch.einsum("td,erd->ter", x, lora_a)
    read = torch.einsum("ter,ekr->tek", z, cores.row_space)
    expected = torch.einsum("td,ekd->tek", x, cores.directions)
    assert torch.allclose(read.abs(), expected.abs(), rtol=1e-8, atol=1e-10)
    assert torch.allclose(read[..., 0].abs(), (x @ arrow_prototypes(lora_a, lora_b)[0].mT).abs(), rtol=1e-8)


def test_norms_of_experts_of_mixed_ranks_find_their_columns(generator: torch.Generator) -> None:
    ranks, width = [2, 1, 2, 3], 3
    z = torch.randn(TOKENS, sum(ranks), generator=generator)
    stacked, expected, start = torch.zeros(sum(ranks), width), [], 0
    for rank in ranks:
        matrix = torch.randn(rank, rank, generator=generator)
        stacked[start : start + rank, :rank] = matrix
        expected.append((z[:, start : start + rank] @ matrix.mT).norm(dim=1))
        start += rank
    assert torch.allclose(block_norms(z, split_blocks(ranks, stacked), 4), torch.stack(expected, dim=1), atol=1e-6)


def test_dead_experts_are_out_of_reach_for_every_rule(generator: torch.Generator) -> None:
    lora_a, lora_b = factors(2, generator)
    lora_b[1] = 0
    facts, alive = expert_facts(lora_a, lora_b), torch.tensor([True, False, True])
    z = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64)
    calibration = torch.tensor([[0.5, 2.0], [0.0, 1.0], [1.5, 0.1]], dtype=z.dtype)
    own = Reading(z, torch.randn_like(z[:, :3]), alive, blocks(facts.row_space), blocks(facts.outputs), calibration)
    for name, rule in ROUTERS.items():
        if rule.scores is not None:
            scores = rule.scores(own)
            assert (scores[:, 1] == -torch.inf).all(), name
            assert scores[:, [0, 2]].isfinite().all(), name


def test_calibrated_norms_are_deviations_from_the_mean(generator: torch.Generator) -> None:
    lora_a, lora_b = factors(2, generator)
    outputs, alive = blocks(expert_facts(lora_a, lora_b).outputs), torch.tensor([True, True, False])
    z = torch.randn(TOKENS, 6, generator=generator, dtype=torch.float64)
    calibration = torch.tensor([[1.0, 2.0], [3.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    plain, found = norm_readout(z, outputs, alive), norm_readout(z, outputs, alive, calibration)
    assert torch.allclose(found[:, 0], (plain[:, 0] - 1) / 2)
    assert torch.allclose(found[:, 1], (plain[:, 1] - 3) * 2)
    assert (found[:, 2] == -torch.inf).all()


def test_lag_with_one_candidate_is_arrow_and_with_all_is_projection(generator: torch.Generator) -> None:
    projections, second = (torch.randn(TOKENS, 5, generator=generator) for _ in range(2))
    first = arrow_readout(projections, torch.ones(5, dtype=torch.bool))
    one = choose(lag_readout(first, second, 1), Choice(top_k=4)).dense(first.shape[1])
    assert torch.equal(one, choose(first, Choice(top_k=1)).dense(first.shape[1]))
    for everything in (5, 100):
        assert torch.equal(lag_readout(first, second, everything), second)
    assert torch.equal(lag_readout(first, second, 2).isfinite().sum(dim=1), torch.full((TOKENS,), 2))


def test_tied_prototypes_are_those_of_the_stacked_updates(generator: torch.Generator) -> None:
    layers = [factors(rank, generator) for rank in (2, 3)]
    stacked = torch.cat([b @ a for a, b in layers], dim=1)
    expected = torch.linalg.svd(stacked).Vh[:, 0]
    found = tied_prototypes([a for a, _ in layers], [expert_facts(a, b).outputs for a, b in layers])
    assert ((found * expected).sum(dim=1).abs() > 1 - 1e-12).all()


def test_the_direction_of_a_zero_update_is_that_of_its_lora_a(generator: torch.Generator) -> None:
    lora_a, _ = factors(3, generator)
    lora_a[2] = 0
    found = input_directions(lora_a)
    expected = torch.linalg.svd(lora_a[:2]).Vh[:, 0]
    assert ((found[:2] * expected).sum(dim=1).abs() > 1 - 1e-12).all()
    assert not found[2].any()


def test_logo_looks_at_the_last_token_that_counts(generator: torch.Generator) -> None:
    real = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0]]).bool()
    assert last_tokens(real).nonzero().tolist() == [[0, 3], [1, 2], [2, 0], [3, 3], [4, 2]]


def test_the_catalogue_says_what_each_rule_needs() -> None:
    for name, rule in ROUTERS.items():
        assert [rule.scores, rule.weights, rule.request, rule.tries or None].count(None) == 3, name
        assert bool(rule.reads) == (rule.scores is not None), name
        assert (rule.decides == "always") == (rule.pers == ()) == (rule.weights is not None), name
        assert (rule.decides == "request") == (rule.pers == ("request",)), name
        is_calibrated = rule.data is not None and rule.data.holds == "moments" and not rule.data.is_optional
        assert (rule.needs == "prepared") == (
            rule.score_rows is not None or rule.request is not None or is_calibrated
        ), name
        reads_request = rule.request is not None or bool(rule.tries)
        assert reads_request == (rule.data is not None and rule.data.holds == "request"), name
