"""A prompt, its answer, and where its tokens went."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lorary.data.template import make_template
from lorary.data.text_of_ids import texts_of_ids
from lorary.errors import ShapeError, UsageError
from lorary.evaluate.completion import answer
from lorary.evaluate.finite import furthest
from lorary.evaluate.metrics.exact import exact_match
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.trace import trace
from lorary.route.setting import Routing


@dataclass(frozen=True)
class RoutedPrompt:
    """A prompt, the answer, and where its tokens went.

    Args:
        prompt: text given to the model.
        answer: text it gave back.
        tokens: the text of each traced token, decoded one by one.
        layers: dotted paths of the routed layers, in the model's order.
        experts: names, in the order of the weights' last axis.
        weights: routing weights, 0..1; a token's weights in one layer sum to at most 1.
        references: answers that count as right; empty where none is known.

    Raises:
        ShapeError: if tokens, layers or experts do not fit the weights.
        UsageError: if something is a weight that cannot be one, or there is nothing to show.
    """

    prompt: str
    answer: str
    tokens: Sequence[str]
    layers: Sequence[str]
    experts: Sequence[str]
    weights: Float[Tensor, "layers tokens experts"]
    references: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.tokens), len(self.experts))
        if shape != tuple(self.weights.shape):
            raise ShapeError(
                f"routing weights must be (layers, tokens, experts) = {shape}", found=tuple(self.weights.shape)
            )
        if 0 in shape:
            raise UsageError("a routed prompt must have layers, tokens and experts", found=shape)
        inside = (self.weights >= 0) & (self.weights <= 1 + 1e-3)
        if not bool(inside.all()):
            raise UsageError("a routing weight must lie in 0..1", found=furthest(self.weights))

    @property
    def is_right(self) -> bool:
        """Whether the answer equals a reference, white space aside."""
        return exact_match(self.answer, self.references) == 1


def trace_prompt(
    base: Base, prompt: str, template: str, router: str | Routing, max_new_tokens: int, references: Sequence[str] = ()
) -> RoutedPrompt:
    """Answer a prompt greedily, then record how one uncached pass over prompt and answer is routed.

    Args:
        base: with experts seated.
        prompt: text to answer.
        template: `plain` or `chat`.
        router: a router that looks at tokens, or a setting of one.
        max_new_tokens: most tokens of the answer.
        references: answers that count as right.

    Returns:
        The trace.
    """
    with routing(base.model, router):
        completion = answer(base, prompt, template, max_new_tokens=max_new_tokens)
        ids = make_template(template, base.tokenizer).encode(prompt, completion.text or " ")
        tokens = [*ids.prompt_ids, *ids.target_ids]
        with torch.no_grad(), trace(base.model) as traced:
            base.model(input_ids=torch.tensor([tokens], device=base.model.device), use_cache=False)
    words = texts_of_ids(base.tokenizer, tokens)
    weights = traced.stacked()[:, 0]
    return RoutedPrompt(prompt, completion.text, words, traced.layers, list(traced.experts), weights, references)
