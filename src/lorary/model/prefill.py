"""The whole prompt of a generation, told to the prober before the model is given it in pieces."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorary.errors import UsageError
from lorary.model.probe import cache_of, is_filled
from lorary.model.seating import Seating

# The step of `generate` that hands the prompt to the model: in one piece, in chunks, or what a cache lacks of it.
STEP = "_prefill"


class Prefill:
    """Stands in for that step on one model while requests are decided.

    A decision by a piece of the prompt would be another one. Where a cache holds a piece of it that was computed under
    another decision, it is emptied and computed anew: with a cache the answer is what it is without.

    Args:
        model: that generates.
        state: says what decides for its requests in the thread that runs.
    """

    def __init__(self, model: Any, state: Seating) -> None:
        self.model, self.state = model, state
        vars(model)[STEP] = self

    def __call__(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **more: Any) -> Any:
        """Decide by the whole prompt where the model will not see it at once, and go on as `generate` does."""
        prober, is_first = self.state.prober, bool(more.get("is_first_iteration", True))
        cache = cache_of(model_kwargs)
        is_chunked = getattr(generation_config, "prefill_chunk_size", None) is not None
        # An assistant drafts several times for one request, with one cache: that is not first.
        if prober and is_first and is_filled(cache) and _is_whole(input_ids, generation_config, model_kwargs):
            _empty(cache)
        if prober and is_chunked and not is_filled(cache):
            prober.decide(self.model, {"input_ids": input_ids, **_given(model_kwargs)})
        return getattr(type(self.model), STEP)(self.model, input_ids, generation_config, model_kwargs, **more)

    def remove(self) -> None:
        """Let the model be as it was."""
        if vars(self.model).get(STEP) is self:
            del vars(self.model)[STEP]


def _is_whole(input_ids: Tensor, generation_config: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether the tokens that the cache holds are among those that were given, by the rule of `generate` itself."""
    if model_kwargs.get("inputs_embeds") is not None:
        return True
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if positions is not None and positions.shape[-1] < input_ids.shape[1]:
        return False
    length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    return bool(length == input_ids.shape[1])


def _empty(cache: Any) -> None:
    try:
        cache.reset()
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UsageError(
            "per='request' decides by the whole prompt, and a part of it was cached under another decision",
            found=f"a {type(cache).__name__} that cannot be emptied",
            remedy="generate without past_key_values",
        ) from error


def _given(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a pass over the whole prompt is given besides its tokens."""
    names = ("attention_mask", "position_ids", "token_type_ids")
    return {name: model_kwargs[name] for name in names if model_kwargs.get(name) is not None}
