"""Stacked factors: each sequence meets the factors of its own unit, and dropout is keyed by unit and row."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lorary.data.packing import Group, micro_batches
from lorary.data.template import Example
from lorary.errors import ShapeError
from lorary.lora.stacked import RowTags, StackedLora


def stacked(generator: torch.Generator, num_slots: int = 3) -> StackedLora:
    lora_a = torch.randn(num_slots, 2, 6, generator=generator, dtype=torch.float64).requires_grad_()
    lora_b = torch.randn(num_slots, 5, 2, generator=generator, dtype=torch.float64).requires_grad_()
    scaling = torch.arange(1, num_slots + 1, dtype=torch.float64)
    return StackedLora(lora_a, lora_b, scaling, RowTags(), "layer")


def inputs(generator: torch.Generator, sequences: int, seq: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randn(sequences, seq, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(sequences, seq, 5, generator=generator, dtype=torch.float64)


def reference(lora: StackedLora, x: Tensor, output: Tensor) -> Tensor:
    """The sum, sequence by sequence."""
    rows = []
    for sequence, slot in enumerate(lora.tags.slots.tolist()):
        delta = lora.scaling[slot] * lora.lora_b[slot] @ lora.lora_a[slot]
        rows.append(output[sequence] + x[sequence] @ delta.mT)
    return torch.stack(rows)


@pytest.mark.parametrize("slots", [[0, 0, 1, 1, 2, 2], [2], [0, 2, 2], [2, 0, 1, 0]])
def test_each_sequence_meets_its_own_unit_and_gives_it_its_gradient(
    generator: torch.Generator, slots: list[int]
) -> None:
    lora = stacked(generator)
    lora.tags.slots, lora.tags.lengths = torch.tensor(slots), (4,) * len(slots)
    x, output = inputs(generator, len(slots))
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    found, wanted = lora(x, output), reference(lora, x, output)
    assert torch.allclose(found, wanted, atol=1e-12)
    factors = [lora.lora_a, lora.lora_b]
    gradients = torch.autograd.grad((found * weights).sum(), factors)
    for gradient, right in zip(gradients, torch.autograd.grad((wanted * weights).sum(), factors), strict=True):
        assert torch.allclose(gradient, right, atol=1e-12)


def test_the_zero_part_of_a_smaller_rank_has_no_gradient(generator: torch.Generator) -> None:
    lora = stacked(generator)
    with torch.no_grad():
        lora.lora_a[1, 1], lora.lora_b[1, :, 1] = 0.0, 0.0
    lora.tags.slots, lora.tags.lengths = torch.tensor([0, 1, 1]), (4, 4, 4)
    lora(*inputs(generator, 3)).square().sum().backward()
    assert lora.lora_a.grad is not None
    assert lora.lora_b.grad is not None
    assert not lora.lora_a.grad[1, 1].any()
    assert not lora.lora_b.grad[1, :, 1].any()
    assert lora.lora_a.grad[1, 0].any()


def test_beside_a_half_precision_layer_the_update_is_computed_in_the_dtype_of_the_units(
    generator: torch.Generator,
) -> None:
    lora = stacked(generator)
    lora.tags.slots, lora.tags.lengths = torch.arange(3), (4, 4, 4)
    x, output = inputs(generator, 3)
    found = lora(x.bfloat16(), output.bfloat16())
    expected = output.bfloat16() + lora(x.bfloat16().double(), torch.zeros_like(output)).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


ROWS = {name: Example(tuple(range(1, length)), (7, 8), 0) for name, length in enumerate((3, 5, 4, 6))}
GROUPS = [Group(0, 0, [ROWS[0], ROWS[1]], [0, 1]), Group(2, 0, [ROWS[2], ROWS[3]], [5, 6])]


def dropped(
    lora: StackedLora, groups: Sequence[Group], max_tokens: int, names: Sequence[object] = ("a", "b", "c")
) -> dict[tuple[int, int], Tensor]:
    """What each row's tokens become under dropout, by slot and row, where all inputs are ones."""
    found = {}
    for micro in micro_batches(groups, max_tokens, share_prefix=False):
        lora.tags.set(micro, names, 0.5, (0,))
        shape = micro.batch.input_ids.shape
        result = lora(torch.ones(*shape, 6, dtype=torch.float64), torch.zeros(*shape, 5, dtype=torch.float64))
        for piece in micro.pieces:
            found[piece.slot, piece.name] = result[piece.sequence, piece.start : piece.stop].detach()
    return found


def same(left: dict[tuple[int, int], Tensor], right: dict[tuple[int, int], Tensor]) -> list[bool]:
    return [torch.allclose(left[key], right[key], atol=1e-12) for key in left.keys() & right.keys()]


def test_dropout_depends_on_neither_company_nor_micro_batches_nor_padding(generator: torch.Generator) -> None:
    lora = stacked(generator)
    together = dropped(lora, GROUPS, max_tokens=1000)
    assert len(together) == 4
    for other in (dropped(lora, GROUPS, max_tokens=5), dropped(lora, GROUPS[1:], max_tokens=1000)):
        assert all(same(together, other))


def test_dropout_depends_on_what_a_slot_is_called(generator: torch.Generator) -> None:
    lora = stacked(generator)
    first = dropped(lora, GROUPS[:1], 1000, names=["a at step 1"])
    assert not any(same(first, dropped(lora, GROUPS[:1], 1000, names=["a at step 2"])))
    rows = [Group(0, 0, [ROWS[3], ROWS[3]], [0, 1])]
    two = dropped(lora, rows, 1000)
    assert not torch.allclose(two[0, 0], two[0, 1])


def test_dropout_keeps_the_mean(generator: torch.Generator) -> None:
    tags = RowTags()
    rows = [Group(0, 0, [Example((1,) * 4000, (2,), 0)], [0])]
    (micro,) = micro_batches(rows, 10_000, share_prefix=False)
    tags.set(micro, ["a"], 0.25, (0,))
    mask = tags.dropout_mask(torch.ones(1, 4000, 6), "layer")
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.02)


def test_dropout_is_not_bent_by_a_half_precision_layer(generator: torch.Generator) -> None:
    tags = RowTags()
    (micro,) = micro_batches([Group(0, 0, [Example((1,) * 8, (2,), 0)], [0])], 100, share_prefix=False)
    tags.set(micro, ["a"], 0.05, (0,))
    lora = StackedLora(torch.eye(4)[None], torch.eye(4)[None], torch.ones(1), tags, "layer")
    seen = lora(torch.ones(1, 8, 4).bfloat16(), torch.zeros(1, 8, 4))  # what passed through lora_a and lora_b
    assert seen.unique().tolist() == pytest.approx([0.0, 1 / 0.95], abs=1e-6)


def test_tokens_without_their_sequences_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ShapeError, match=r"layer 'layer' must be given \(batch, seq, d_in\)"):
        # Behind the shape checker of the tests, which refuses this before the function runs.
        StackedLora.forward.__wrapped__(stacked(generator), torch.ones(6, 6), torch.ones(6, 5))  # type: ignore[attr-defined]
