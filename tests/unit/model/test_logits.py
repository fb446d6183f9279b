"""Logits at target positions are the full logits there, and padding is never seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorary.data.batching import collate, input_length
from lorary.model.logits import target_logits, target_losses

Make = Callable[..., Any]


def test_target_logits_equal_full_logits_at_those_positions(
    tiny_model: Make, random_examples: Make, generator: torch.Generator
) -> None:
    model, batch = tiny_model(), collate(random_examples(5, generator))
    full = model(input_ids=batch.input_ids).logits
    found = target_logits(model, batch)
    assert found.shape == (len(batch.labels), 300)
    assert torch.allclose(found, full[batch.rows, batch.positions], atol=1e-5)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_losses_are_negative_log_likelihoods(
    tiny_model: Make, random_examples: Make, generator: torch.Generator
) -> None:
    model, examples = tiny_model(dtype=torch.float64), random_examples(3, generator)
    losses = target_losses(model, collate(examples))
    expected = []
    for example in examples:
        ids = torch.tensor([[*example.prompt_ids, *example.target_ids]])
        log_likelihood = model(input_ids=ids).logits[0].log_softmax(-1)
        first = len(example.prompt_ids)
        expected += [-log_likelihood[first + i - 1, label] for i, label in enumerate(example.target_ids)]
    assert losses.dtype == torch.float64
    assert torch.allclose(losses, torch.stack(expected), atol=1e-6)


def test_what_stands_in_the_padding_has_no_effect(
    tiny_model: Make, random_examples: Make, generator: torch.Generator
) -> None:
    model, examples = tiny_model(), random_examples(4, generator)
    assert len({input_length(example) for example in examples}) > 1
    assert torch.equal(target_losses(model, collate(examples)), target_losses(model, collate(examples, pad_id=77)))


def test_losses_of_a_half_precision_model_are_float32(
    tiny_model: Make, random_examples: Make, generator: torch.Generator
) -> None:
    assert (
        target_losses(tiny_model(dtype=torch.bfloat16), collate(random_examples(2, generator))).dtype == torch.float32
    )


def test_the_head_is_free_again_after_an_error(
    tiny_model: Make, random_examples: Make, generator: torch.Generator
) -> None:
    model, batch = tiny_model(), collate(random_examples(2, generator))
    with pytest.raises(IndexError):
        target_logits(model, batch._replace(input_ids=batch.input_ids + 1000))
    assert not model.get_output_embeddings()._forward_pre_hooks
