"""Mixed factors: Poly and MHR against a naive reference, and the cases in which they are something simpler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorary.data.packing import Piece
from lorary.errors import ShapeError
from lorary.lora.poly import PolyLora, mix_factors, mixing_weights
from lorary.lora.stacked import RowTags, StackedLora

SKILLS, TASKS, RANK, D_IN, D_OUT = 3, 4, 2, 6, 12


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixed(generator: torch.Generator, *, skills: int = SKILLS, splits: int = 1) -> PolyLora:
    shapes = ((skills, RANK, D_IN), (skills, D_OUT, RANK), (TASKS, splits, skills))
    return PolyLora(*(randn(generator, *shape).requires_grad_() for shape in shapes), 1.7, RowTags(), "layer")


def inputs(generator: torch.Generator, lora: PolyLora, tasks: list[int]) -> tuple[Tensor, Tensor]:
    lora.tags.tasks, lora.tags.lengths = torch.tensor(tasks), (5,) * len(tasks)
    return randn(generator, len(tasks), 5, D_IN), randn(generator, len(tasks), 5, D_OUT)


def naive(lora: PolyLora, x: Tensor, output: Tensor, tasks: list[int]) -> Tensor:
    """Row by row, block by block, skill by skill: nothing shared with the implementation but the definition."""
    splits = lora.logits.shape[1]
    rows = []
    for row, task in enumerate(tasks):
        blocks_a, blocks_b = [], []
        for split in range(splits):
            on = 1 / (1 + torch.exp(-lora.logits[task, split]))
            weights = on / (on.sum() + 1e-8)
            columns = slice(split * D_IN // splits, (split + 1) * D_IN // splits)
            lines = slice(split * D_OUT // splits, (split + 1) * D_OUT // splits)
            blocks_a.append(sum(w * a[:, columns] for w, a in zip(weights, lora.lora_a, strict=True)))
            blocks_b.append(sum(w * b[lines] for w, b in zip(weights, lora.lora_b, strict=True)))
        lora_a, lora_b = torch.cat(blocks_a, dim=1), torch.cat(blocks_b)
        rows.append(output[row] + lora.scaling * x[row] @ lora_a.T @ lora_b.T)
    return torch.stack(rows)


def gradients(lora: PolyLora, x: Tensor, found: Tensor, target: Tensor) -> list[Tensor]:
    loss = (found - target).pow(3).sum()
    return list(torch.autograd.grad(loss, [lora.lora_a, lora.lora_b, lora.logits, x]))


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
@pytest.mark.parametrize("tasks", [[0, 1, 2, 3], [2], [3, 1, 1, 3, 1]])
def test_output_and_gradients_are_those_of_the_definition(
    generator: torch.Generator, splits: int, tasks: list[int]
) -> None:
    lora = mixed(generator, splits=splits)
    x, output = inputs(generator, lora, tasks)
    x.requires_grad_()
    target = randn(generator, *output.shape)
    found, expected = lora(x, output), naive(lora, x, output, tasks)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11)
    for own, reference in zip(gradients(lora, x, found, target), gradients(lora, x, expected, target), strict=True):
        assert (own - reference).norm() <= 1e-10 * reference.norm()


def test_a_task_out_of_a_batch_gets_no_gradient(generator: torch.Generator) -> None:
    lora = mixed(generator)
    x, output = inputs(generator, lora, [0, 2, 2])
    gradient = torch.autograd.grad(lora(x, output).pow(2).sum(), lora.logits)[0]
    assert not gradient[1].any()
    assert not gradient[3].any()
    assert gradient[0].all()


def test_one_skill_is_a_plain_lora(generator: torch.Generator) -> None:
    lora = mixed(generator, skills=1, splits=2)
    x, output = inputs(generator, lora, [0, 3, 1])
    plain = StackedLora(lora.lora_a, lora.lora_b, torch.tensor([1.7], dtype=torch.float64), lora.tags, "layer")
    lora.tags.slots = torch.zeros(3, dtype=torch.long)
    # The weight of the one skill is 1 but for the 1e-8 in the denominator, which the sigmoid of a random logit dwarfs.
    assert torch.allclose(lora(x, output), plain(x, output), rtol=0, atol=1e-5)
    assert torch.allclose(mixing_weights(lora.logits), torch.ones_like(lora.logits), rtol=0, atol=1e-6)


@pytest.mark.parametrize("splits", [2, 3])
def test_equal_weights_in_all_splits_are_poly(generator: torch.Generator, splits: int) -> None:
    poly = mixed(generator)
    logits = poly.logits.expand(TASKS, splits, SKILLS)
    mhr = PolyLora(poly.lora_a, poly.lora_b, logits, poly.scaling, poly.tags, "layer")
    x, output = inputs(generator, poly, [1, 0, 3])
    assert torch.allclose(poly(x, output), mhr(x, output), rtol=0, atol=1e-12)


def test_a_zero_lora_b_leaves_the_layer_as_it_is(generator: torch.Generator) -> None:
    lora = mixed(generator, splits=2)
    lora.lora_b.data.zero_()
    x, output = inputs(generator, lora, [1, 0, 3])
    assert torch.equal(lora(x, output), output)


def test_beside_a_half_precision_layer_the_update_is_computed_in_the_dtype_of_the_skills(
    generator: torch.Generator,
) -> None:
    lora = mixed(generator)
    x, output = inputs(generator, lora, [1, 0, 3])
    found = lora(x.bfloat16(), output.bfloat16())
    assert found.dtype == torch.bfloat16
    update = lora(x.bfloat16().double(), torch.zeros_like(output)).bfloat16()
    assert torch.equal(found, output.bfloat16() + update)


def test_dropout_falls_on_the_input_of_the_mixture_only(generator: torch.Generator) -> None:
    lora = mixed(generator)
    x, output = inputs(generator, lora, [1])
    whole = lora(x, output)
    lora.tags.pieces, lora.tags.names = (Piece(0, 0, 5, 0, 0),), ("unit",)
    lora.tags.dropout, lora.tags.key = 0.5, (0,)
    dropped = lora(x, output)
    mask = lora.tags.dropout_mask(x, "layer")
    lora.tags.dropout = 0.0
    assert torch.allclose(dropped, lora(x * mask, output), rtol=0, atol=1e-12)
    assert not torch.allclose(dropped, whole)


@given(st.lists(st.floats(-15, 30), min_size=1, max_size=8))
def test_weights_are_positive_and_sum_to_one(logits: list[float]) -> None:
    weights = mixing_weights(torch.tensor(logits, dtype=torch.float64))
    assert bool((weights > 0).all())
    assert float(weights.sum()) == pytest.approx(1.0, abs=0.04)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_skills_do_not_compete_for_their_logits(logits: list[float]) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    weights = mixing_weights(values)
    ratio = weights[0] / weights[1]
    assert float(ratio) == pytest.approx(float(torch.sigmoid(values[0]) / torch.sigmoid(values[1])))


def test_the_order_of_the_skills_does_not_matter(generator: torch.Generator) -> None:
    lora_a, lora_b = randn(generator, SKILLS, RANK, D_IN), randn(generator, SKILLS, D_OUT, RANK)
    weights = mixing_weights(randn(generator, TASKS, 2, SKILLS))
    order = [2, 0, 1]
    shuffled = mix_factors(lora_a[order], lora_b[order], weights[..., order])
    for one, other in zip(mix_factors(lora_a, lora_b, weights), shuffled, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("splits", [4, 5, 12])
def test_a_layer_that_splits_do_not_divide_is_refused_by_name(generator: torch.Generator, splits: int) -> None:
    with pytest.raises(ShapeError, match=rf"of layer 'layer' .*\nfound: {splits} splits of d_in 6 and d_out 12"):
        mixed(generator, splits=splits)


def test_tokens_without_their_sequences_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ShapeError, match=r"layer 'layer' must be given \(batch, seq, d_in\)"):
        # Behind the shape checker of the tests, which refuses this before the function runs.
        PolyLora.forward.__wrapped__(mixed(generator), torch.ones(6, 6), torch.ones(6, 12))  # type: ignore[attr-defined]
