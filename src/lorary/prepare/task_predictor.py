"""The task predictor's data: vectors of every expert's prompts, and a classifier that tells them apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorary.data.template import Example
from lorary.model.features import embedding, prompt_vectors
from lorary.model.prepared import REQUEST
from lorary.ops.logistic import fit_logistic
from lorary.prepare.measure import MeasureContext, Tensors


def expert_prompts(context: MeasureContext, name: str, examples: Sequence[Example]) -> tuple[Tensors, dict[str, Any]]:
    """(prompts, features), the vectors of an expert's prompts, as a request with that prompt would get them."""
    model = context.base.model
    embed = embedding(context.settings.routing, model, context.base.tokenizer)
    return {REQUEST: prompt_vectors(model, embed, [example.prompt_ids for example in examples])}, {}


def fitted_predictor(samples: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
    """(features + 1,) for each expert: coefficients and intercept of a classifier over the prompts of all experts."""
    vectors = [tensors[REQUEST] for tensors in samples.values()]
    labels = torch.arange(len(vectors)).repeat_interleave(torch.tensor([len(prompts) for prompts in vectors]))
    coefficients = fit_logistic(torch.cat(vectors), labels, len(vectors)).to(vectors[0].dtype)
    return {name: {REQUEST: row} for name, row in zip(samples, coefficients, strict=True)}
