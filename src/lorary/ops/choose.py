"""From scores to the chosen experts and their routing weights, in steps that compose.

An expert is out when its logit is minus infinity. A score that is not a number stays visible in the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorary.errors import UsageError
from lorary.numbers import check_count, check_number, is_number, shown
from lorary.ops.upload import upload

# Scores in float32, divided by the one at most as large as the other, stay what float32 holds.
MOST_SCORE, LEAST_TEMPERATURE = 1e15, 1e-20
# How the updates of chosen experts are put together: their outputs are summed, or their factors are.
Mix = Literal["outputs", "factors"]
Scale = Literal["softmax", "unit", "uniform", "proportional"]


@dataclass(frozen=True)
class Choice:
    """How scores become routing weights. The steps run in the order of the fields below.

    Args:
        top_k: the most experts, at least 1, clamped to the number there is.
        top_p: of these, the fewest best ones whose softmax reaches this mass, above 0 and at most 1; None for all.
        threshold: the lowest score, in the rule's own units, with which an expert may be chosen; None for any.
        temperature: divides the scores before every softmax, above 0.
        scale: `softmax` over the chosen; `unit`: weight 1 for each of them; `uniform`: 1 / their number;
            `proportional`: their scores divided by the sum of these, where one below zero counts as zero.
        null: the score of the base, which is one candidate more and goes through all steps: the weight that it wins
            is not used. None for no such candidate.

    Raises:
        UsageError: if a value is out of range, or two of them exclude each other.
    """

    top_k: int = 4
    top_p: float | None = None
    threshold: float | None = None
    temperature: float = 1.0
    scale: Scale = "softmax"
    null: float | None = None

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.temperature)
        for name in ("top_p", "threshold", "null"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and abs(value) <= MOST_SCORE):
                rule = f"{name} must be a finite number, {MOST_SCORE:g} at most in size"
                raise UsageError(rule, found=shown(value), remedy="leave it out for none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(
                "top_p must be above 0 and at most 1", found=self.top_p, remedy="leave it out for no limit"
            )
        if self.scale not in get_args(Scale):
            raise UsageError(f"scale must be one of {list(get_args(Scale))}", found=repr(self.scale))
        if self.null is not None and self.threshold is not None and self.null < self.threshold:
            raise UsageError(
                "null must not lie below threshold, which would never let it be chosen",
                found=f"null {self.null}, threshold {self.threshold}",
                remedy="leave one of them out",
            )

    def most(self, num_experts: int) -> int:
        """Places in the choice of a token: `top_k`, clamped to the candidates there are, the base among them."""
        return min(self.top_k, num_experts + (self.null is not None))


def check_choice(top_k: int, temperature: float) -> None:
    """Refuse settings under which no expert could be chosen.

    Raises:
        UsageError: if `top_k` is below 1, or `temperature` is not a positive finite number.
    """
    check_count("top_k", top_k, remedy="router 'base' uses no expert at all")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise UsageError("temperature must be a number", found=shown(temperature))
    if not (is_number(temperature) and temperature > 0):
        raise UsageError("temperature must be a positive number", found=shown(temperature))
    # Scores divided by less, or by more, leave what float32 holds: all experts would be alike, or no score finite.
    check_number("temperature", temperature, least=LEAST_TEMPERATURE, most=1 / LEAST_TEMPERATURE)


class Chosen(NamedTuple):
    """The experts of each token.

    Args:
        experts: (tokens, k) int64, their positions among those that were scored, best first.
        weights: (tokens, k) routing weights; 0 for a place that no expert took, whose position means nothing.
    """

    experts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, weights: Float[Tensor, " experts"]) -> "Chosen":
        """The experts of one token that have a weight.

        Args:
            weights: of all experts, on the CPU: a device would make the host wait.
        """
        experts = weights.nonzero().squeeze(1)
        return cls(experts[None], weights[experts][None])

    def dense(self, num_experts: int) -> Float[Tensor, "tokens experts"]:
        """The same as one weight for each of `num_experts` experts."""
        weights = self.weights.new_zeros(self.weights.shape[0], num_experts)
        return weights.scatter_add(1, self.experts, self.weights)

    def like(self, x: Tensor) -> "Chosen":
        """The same on the device and in the dtype of `x`."""
        return Chosen(upload(self.experts, x.device), upload(self.weights.to(x.dtype), x.device))

    def among(self, position: Int[Tensor, " experts"]) -> "Chosen":
        """The same with other positions: `position` holds the new one of each expert, -1 for one that is not there."""
        experts = position[self.experts]
        return Chosen(experts.clamp_min(0), self.weights.masked_fill(experts < 0, 0.0))

    def or_else(self, fallback: "Chosen") -> "Chosen":
        """The same, with the experts of `fallback` for each token that has no expert.

        On the CPU it gets wider only if there is such a token: the plans there gain by few places. To ask for that on
        another device, the host would have to wait for it.

        Args:
            fallback: of one token, on any device.
        """
        lost = ~self.weights.any(dim=1)
        if self.weights.is_cpu and not bool(lost.any()):
            return self
        width = max(self.experts.shape[1], fallback.experts.shape[1])
        last = _padded(Chosen(*(part.expand(len(lost), -1) for part in fallback.like(self.weights))), width)
        return Chosen(*(torch.where(lost[:, None], b, a) for a, b in zip(_padded(self, width), last, strict=True)))


def _padded(chosen: Chosen, width: int) -> Chosen:
    missing = width - chosen.experts.shape[1]
    return Chosen(*(torch.nn.functional.pad(part, (0, missing)) for part in chosen))


def choose(scores: Float[Tensor, "tokens experts"], choice: Choice) -> Chosen:
    """The experts of each token and their routing weights.

    Only scores above minus infinity take part: such an expert is never chosen, even where fewer than k remain, and a
    token without such a score gets no expert. Which of several equal scores is taken is not defined.

    Args:
        scores: float32 or float64; minus infinity marks an expert that may not be chosen.
        choice: the steps.

    Returns:
        Weights in the dtype of the scores. They sum to 1 over the experts (and the null expert, whose weight is left
        out), except with `scale="unit"`, or to 0 where no expert may be chosen.
    """
    num_experts = scores.shape[-1]
    if choice.null is not None:
        scores = torch.nn.functional.pad(scores, (0, 1), value=choice.null)
    best, experts = scores.topk(choice.most(num_experts), dim=-1)
    logits = best / choice.temperature
    if choice.top_p is not None:
        logits = keep_top_p(logits, choice.top_p)
    if choice.threshold is not None:
        logits = logits.masked_fill(best < choice.threshold, -torch.inf)
    weights = _SCALES[choice.scale](logits)
    if choice.null is None:
        return Chosen(experts, weights)
    is_null = experts == num_experts
    return Chosen(experts.masked_fill(is_null, 0), weights.masked_fill(is_null, 0.0))


def keep_top_k(logits: Float[Tensor, "*tokens experts"], top_k: int) -> Float[Tensor, "*tokens experts"]:
    """The k highest logits of each token, minus infinity elsewhere; k is clamped to the number there is."""
    if top_k >= logits.shape[-1]:
        return logits
    best, chosen = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, chosen, best)


def keep_top_p(logits: Float[Tensor, "*tokens experts"], top_p: float) -> Float[Tensor, "*tokens experts"]:
    """The fewest of each token's logits, best first, whose softmax reaches `top_p`, minus infinity elsewhere."""
    shares = logits.softmax(dim=-1)
    # What lies before it suffices; never so for the best one.
    return logits.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, -torch.inf)


def softmax_weights(logits: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
    """Softmax over the experts that are left; zeros where there is no such expert."""
    weights = logits.softmax(dim=-1)
    # A row of minus infinities has a softmax of NaN; a NaN score itself must stay visible.
    return weights.masked_fill((logits == -torch.inf).all(dim=-1, keepdim=True), 0.0)


def unit_weights(logits: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
    """Weight 1 for each expert that is left: every one acts as it was trained to."""
    return (logits != -torch.inf).to(logits.dtype).masked_fill(logits.isnan(), torch.nan)


def even_weights(logits: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
    """The same weight for each expert that is left, 1 in all."""
    weights = unit_weights(logits)
    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(1.0)


def proportional_weights(logits: Float[Tensor, "*tokens experts"]) -> Float[Tensor, "*tokens experts"]:
    """The share of each expert that is left in the sum of their scores; zeros where no score is above zero."""
    shares = logits.masked_fill(logits == -torch.inf, 0.0).clamp_min(0.0)
    total = shares.sum(dim=-1, keepdim=True)
    return shares / total.masked_fill(total == 0, 1.0)


_SCALES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax_weights,
    "unit": unit_weights,
    "uniform": even_weights,
    "proportional": proportional_weights,
}


def top_k_softmax(
    scores: Float[Tensor, "*tokens experts"], top_k: int, temperature: float
) -> Float[Tensor, "*tokens experts"]:
    """Softmax over the k highest scores of each token, zero elsewhere: `choose` with its two commonest steps.

    Args:
        scores: (..., experts), float32 or float64; minus infinity marks an expert that may not be chosen.
        top_k: experts per token, clamped to the number there is.
        temperature: divides the scores.

    Returns:
        Weights of the same shape and dtype; they sum to 1 over the experts, or to 0 where none may be chosen.
    """
    chosen = choose(scores.flatten(0, -2), Choice(top_k=top_k, temperature=temperature))
    return chosen.dense(scores.shape[-1]).view(scores.shape)
