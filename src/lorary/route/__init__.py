"""Routing rules: one rule = one file = one pure function. The whole menu stands in `ROUTERS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorary.route.arrow import arrow_readout
from lorary.route.uniform import uniform_weights


@dataclass(frozen=True)
class Rule:
    """How one router decides.

    Args:
        readout: for a rule that looks at each token: (projections (tokens, experts), alive (experts,)) -> scores.
        weights: for a rule that does not: names of the experts -> (experts,) weights.
        summary: one sentence for `--help` and the documentation.
    """

    summary: str
    readout: Callable[[Tensor, Tensor], Tensor] | None = None
    weights: Callable[[Sequence[str]], Tensor] | None = None


ROUTERS: Mapping[str, Rule] = {
    "arrow": Rule("per token and layer, the experts whose dominant input direction explains the token", arrow_readout),
    "uniform": Rule("the mean of all experts, everywhere", weights=uniform_weights),
    "base": Rule("no expert: the bare base model", weights=lambda experts: uniform_weights(experts) * 0),
}
