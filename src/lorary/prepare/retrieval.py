"""Retrieval's data: the mean vector of an expert's own prompts."""

from collections.abc import Sequence
from typing import Any

from torch.nn.functional import normalize

from lorary.data.template import Example
from lorary.model.prepared import REQUEST
from lorary.prepare.measure import MeasureContext, Tensors
from lorary.prepare.task_predictor import expert_prompts


def mean_prompt(context: MeasureContext, name: str, examples: Sequence[Example]) -> tuple[Tensors, dict[str, Any]]:
    """The mean of the unit vectors of an expert's prompts; see `expert_prompts`."""
    vectors, notes = expert_prompts(context, name, examples)
    return {REQUEST: normalize(vectors[REQUEST], dim=1).mean(dim=0)}, notes
