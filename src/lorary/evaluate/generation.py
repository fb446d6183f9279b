"""Answers through transformers' own `generate`, padded on the left and batched by length."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from lorary.data.batching import length_buckets
from lorary.data.text_of_ids import text_of_ids
from lorary.evaluate.decoding import cut_at


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_tokens: int = 2048,
    *,
    stop: tuple[str, ...] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Generate one answer per prompt: the likeliest token each time, or one drawn by the prompt's own seed.

    Args:
        model: a transformers model for causal language modelling, routed or not.
        tokenizer: its tokenizer; its EOS ends an answer.
        prompts: token ids of each prompt.
        max_new_tokens: most tokens of an answer.
        max_tokens: padded prompt tokens of one batch.
        stop: texts that end an answer and are cut off with all that follows.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that hold so much of the probability.
        seeds: one per prompt, needed where the temperature is above 0; what is drawn does not depend on the batch.

    Returns:
        The answers as text without special tokens, in the order given.
    """
    device = next(model.parameters()).device
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers: list[str] = [""] * len(prompts)
    for bucket in length_buckets([len(prompt) for prompt in prompts], max_tokens):
        input_ids, mask = left_pad([prompts[i] for i in bucket], tokenizer.pad_token_id)
        more: dict[str, Any] = {}
        if stop:
            more["stopping_criteria"] = StoppingCriteriaList([_Stops(tokenizer, stop, [prompts[i] for i in bucket])])
        if temperature > 0 and seeds is not None:
            more["logits_processor"] = [Sampler(temperature, top_p, [seeds[i] for i in bucket])]
        with plain_generation(model, tokenizer):
            output = model.generate(
                input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config, **more
            )
        for i, new in zip(bucket, output[:, input_ids.shape[1] :].tolist(), strict=True):
            answers[i] = cut_at(text_of_ids(tokenizer, new, prompts[i], special=False), stop)
    return answers


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left, where generation needs it.

    Returns:
        input_ids and attention mask, both (batch, seq) int64; the mask goes by position, never by id.
    """
    seq = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), seq), pad_id)
    mask = torch.zeros(len(prompts), seq, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, seq - len(prompt) :] = torch.tensor(prompt)
        mask[row, seq - len(prompt) :] = 1
    return input_ids, mask


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS and those of the model's generation config."""
    return sorted(
        {*eos_ids(model.generation_config), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    )


def eos_ids(generation_config: Any) -> list[int]:
    """Ids that end an answer by a generation config, sorted; none where it names none, or is None."""
    eos = getattr(generation_config, "eos_token_id", None)
    return sorted({int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None})


@contextmanager
def plain_generation(model: Any, tokenizer: Any) -> Iterator[None]:
    """Keep a base's own generation defaults (penalties, beams, words it rules out) out of what is scored.

    transformers fills with them whatever a `GenerationConfig` leaves unset, and the answer would no longer be the
    likeliest one. What ends an answer stays.

    Args:
        model: a transformers model for causal language modelling.
        tokenizer: its tokenizer.
    """
    defaults = model.generation_config
    stops = stop_ids(model, tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = defaults


class _Stops(StoppingCriteria):
    """Ends a row as soon as its text holds a stop; only saves time, since answers are cut afterwards."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], prompts: Sequence[Sequence[int]]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._prompts = prompts
        self._longest = max(map(len, prompts))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = zip(input_ids[:, self._longest :].tolist(), self._prompts, strict=True)
        texts = [text_of_ids(self._tokenizer, new, prompt, special=False) for new, prompt in rows]
        return torch.tensor([cut_at(text, self._stop) != text for text in texts], device=input_ids.device)


class Sampler(LogitsProcessor):
    """Leaves each row the one token that its own generator draws; the greedy choice then takes it.

    It depends on the row's own seed alone: transformers samples all rows of a batch from one stream, so that an answer
    changes with the company of its row.

    Args:
        temperature: above 0.
        top_p: in 0..1; tokens beyond the likeliest ones that hold so much probability are left out.
        seeds: one per row of the batch.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._top_p = top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(batch, vocabulary) logits with all but the token drawn at minus infinity."""
        probabilities = (scores.double() / self._temperature).softmax(-1)
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        cumulative = ordered.cumsum(-1)
        ordered = ordered.masked_fill(cumulative - ordered >= self._top_p, 0.0)  # the likeliest token always stays
        cumulative = ordered.cumsum(-1)
        draws = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators])
        target = draws.to(scores.device)[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, target, right=True)
        last = (ordered > 0).sum(-1, keepdim=True) - 1
        drawn = ids.gather(-1, torch.minimum(place, last))
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)
