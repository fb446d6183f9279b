"""Stacked factors: each row meets the factors of its own expert, and dropout is keyed by the expert."""

import pytest
import torch
from torch import Tensor

from lorary.errors import ShapeError
from lorary.lora.stacked import RowTags, StackedLora, all_experts


def stacked(generator: torch.Generator, num_experts: int = 3) -> StackedLora:
    lora_a = torch.randn(num_experts, 2, 6, generator=generator, dtype=torch.float64)
    lora_b = torch.randn(num_experts, 5, 2, generator=generator, dtype=torch.float64)
    scaling = torch.arange(1, num_experts + 1, dtype=torch.float64)
    return StackedLora(lora_a, lora_b, scaling, RowTags(all_experts(num_experts, torch.device("cpu"))), "layer")


def inputs(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 4, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 4, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("members", [[0, 1, 2], [2], [0, 2]])
def test_each_row_meets_its_own_expert(generator: torch.Generator, members: list[int]) -> None:
    lora = stacked(generator)
    lora.tags.experts = torch.tensor(members)
    x, output = inputs(generator, 2 * len(members))
    found = lora(x, output)
    for row in range(2 * len(members)):
        expert = members[row // 2]
        delta = lora.scaling[expert] * lora.lora_b[expert] @ lora.lora_a[expert]
        assert torch.allclose(found[row], output[row] + x[row] @ delta.mT, atol=1e-12)


def test_beside_a_half_precision_layer_the_update_is_computed_in_the_dtype_of_the_experts(
    generator: torch.Generator,
) -> None:
    lora = stacked(generator)
    x, output = inputs(generator, 3)
    found = lora(x.bfloat16(), output.bfloat16())
    expected = output.bfloat16() + (lora(x.bfloat16().double(), torch.zeros_like(output))).bfloat16()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def dropped(lora: StackedLora, x: Tensor, output: Tensor, members: list[int], length: int, step: int = 3) -> Tensor:
    names = [("a", "b", "c")[m] for m in members]
    lora.tags.experts, lora.tags.names = torch.tensor(members), tuple(names)
    lora.tags.lengths, lora.tags.dropout, lora.tags.key = (length,) * len(members), 0.5, (0, step, 0)
    result: Tensor = lora(x, output)
    return result


def test_dropout_depends_on_neither_neighbours_nor_padding(generator: torch.Generator) -> None:
    lora = stacked(generator)
    x, output = inputs(generator, 3)
    together = dropped(lora, x, output, [0, 1, 2], length=4)
    alone = dropped(lora, x[1:2], output[1:2], [1], length=4)
    assert torch.allclose(together[1:2], alone, atol=1e-12)
    short = dropped(lora, x[1:2, :3], output[1:2, :3], [1], length=3)
    padded = dropped(lora, x[1:2], output[1:2], [1], length=3)
    assert torch.allclose(padded[:, :3], short, atol=1e-12)
    assert not torch.allclose(dropped(lora, x[1:2], output[1:2], [1], length=4, step=4), alone)


def test_dropout_keeps_the_mean(generator: torch.Generator) -> None:
    lora = stacked(generator, num_experts=1)
    x, output = torch.ones(1, 4000, 6, dtype=torch.float64), torch.zeros(1, 4000, 5, dtype=torch.float64)
    found = dropped(lora, x, output, [0], length=4000).mean(dim=1)
    lora.tags.dropout = 0.0
    assert torch.allclose(found, lora(x, output).mean(dim=1), atol=0.3)


def test_tokens_without_their_rows_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(ShapeError, match=r"layer 'layer' must be given \(batch, seq, d_in\)"):
        # Behind the shape checker of the tests, which refuses this before the function runs.
        StackedLora.forward.__wrapped__(stacked(generator), torch.ones(6, 6), torch.ones(6, 5))  # type: ignore[attr-defined]
