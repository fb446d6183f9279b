"""What routing weights say: usage, entropy, agreement of two routers, tokens to leave out.

A *pair* is one token in one layer. All functions take the pairs that count, flattened or by layer, and know nothing of
names; `docs/explain.md` says what each number means.
"""

from math import log
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# A weight that rounding left over from a softmax is no share of the base.
ROUNDING = 1e-6
# A token counts as an attention sink where its hidden state is so many times as long as the median of its row.
SINK_RATIO = 20.0
# Chosen, but with less than this part of an equal share.
HARDLY = 0.1
# The strongest expert of more than this part of the pairs, and of more than this many times an equal share of them.
DOMINATING = 0.5
DOMINATING_TIMES = 1.5


def as_shares(weights: Float[Tensor, "*pairs experts"]) -> Float[Tensor, "*pairs outcomes"]:
    """Routing weights as a distribution over the experts and, as the last outcome, the base.

    The base has what the experts leave of 1 (a null expert, or no expert that may be chosen). Weights that sum to more
    than 1 (scale='unit') are divided by their sum, so that choices of any scale can be compared.

    Args:
        weights: 0 and up, any float dtype.

    Returns:
        float64, 0..1; the last axis sums to 1.
    """
    weights = weights.double()
    left = (1 - weights.sum(dim=-1, keepdim=True)).clamp_min(0)
    parts = torch.cat([weights, left.where(left > ROUNDING, 0.0)], dim=-1)
    return parts / parts.sum(dim=-1, keepdim=True)


def entropy(shares: Float[Tensor, "*pairs outcomes"]) -> Float[Tensor, "*pairs"]:
    """Shannon entropy in nats: 0 where one takes all, ln n where n share alike."""
    return torch.special.entr(shares).sum(dim=-1)


class Measures(NamedTuple):
    """Some pairs, summed up.

    Args:
        usage: (experts,) mean share of each expert, the base left out.
        entropy: mean over pairs of the entropy of a pair's shares, in nats: how many experts share a token.
        balance: entropy of the mean shares, in nats: how many experts are used at all.
    """

    usage: Tensor
    entropy: float
    balance: float

    @property
    def information(self) -> float:
        """Nats that token and layer tell about the choice: 0 where all pairs choose alike (mutual information)."""
        return max(0.0, self.balance - self.entropy)


def measure(shares: Float[Tensor, "pairs outcomes"]) -> Measures:
    """Usage and entropies over some pairs.

    Args:
        shares: of `as_shares`, at least one pair.
    """
    mean = shares.mean(dim=0)
    return Measures(mean[:-1], float(entropy(shares).mean()), float(entropy(mean)))


class RoutingAgreement(NamedTuple):
    """How far two routers choose alike, mean over pairs.

    Args:
        top1: share of pairs in which both have the same strongest expert, or both the base.
        overlap: experts that both chose, of those that either chose (Jaccard); 1 where neither chose any.
        divergence: Jensen-Shannon divergence of the two shares in bits: 0 for equal ones, 1 for no expert in common.
    """

    top1: float
    overlap: float
    divergence: float


def agreement(
    shares: Float[Tensor, "pairs outcomes"], other_shares: Float[Tensor, "pairs outcomes"]
) -> RoutingAgreement:
    """Compare two routers on the same pairs.

    Args:
        shares: shares of `as_shares`, at least one pair.
        other_shares: those of another router.
    """
    top1 = (shares.argmax(dim=-1) == other_shares.argmax(dim=-1)).double().mean()
    first, second = shares[:, :-1] > 0, other_shares[:, :-1] > 0
    union = (first | second).sum(dim=-1)
    overlap = torch.where(union > 0, (first & second).sum(dim=-1) / union.clamp_min(1), 1.0)
    divergence = (entropy((shares + other_shares) / 2) - (entropy(shares) + entropy(other_shares)) / 2) / log(2)
    return RoutingAgreement(float(top1), float(overlap.mean()), float(divergence.clamp(0, 1).mean()))


class ExpertUse(NamedTuple):
    """How one expert fares in the layers where it may be chosen.

    Args:
        layers: number of these layers.
        usage: its mean share.
        equal: the share it would have if all experts that may be chosen there were used alike.
        chosen: share of the pairs in which it has any weight.
        leads: share of the pairs in which it is the strongest.
    """

    layers: int
    usage: float
    equal: float
    chosen: float
    leads: float

    @property
    def verdict(self) -> str:
        """`out of reach`, `dead`, `hardly used`, `dominating`, or nothing to remark."""
        if not self.layers:
            return "out of reach"
        if self.chosen == 0:
            return "dead"
        if self.usage < HARDLY * self.equal:
            return "hardly used"
        is_strong = self.leads > max(DOMINATING, DOMINATING_TIMES * self.equal)
        return "dominating" if is_strong else ""


def expert_use(
    shares: Float[Tensor, "layers tokens outcomes"], reach: Bool[Tensor, "layers experts"]
) -> list[ExpertUse]:
    """How each expert fares, over the layers where it may be chosen alone.

    Args:
        shares: of `as_shares`, at least one token.
        reach: whether the expert has the layer and is allowed there.

    Returns:
        One record per expert.
    """
    in_layer = reach.sum(dim=1).clamp_min(1)  # (layers,)
    leader = shares.argmax(dim=-1)
    uses = []
    for expert in range(reach.shape[1]):
        layers = reach[:, expert]
        if not bool(layers.any()):
            uses.append(ExpertUse(0, 0.0, 0.0, 0.0, 0.0))
            continue
        expert_shares = shares[layers, :, expert]
        leads = (leader[layers] == expert).double().mean()
        equal = (1 / in_layer[layers]).double().mean()
        values = (float(value) for value in (expert_shares.mean(), equal, (expert_shares > 0).double().mean(), leads))
        uses.append(ExpertUse(int(layers.sum()), *values))
    return uses


def norm_ratios(norms: Float[Tensor, "states tokens"]) -> Float[Tensor, " tokens"]:
    """How far a token's hidden state stands out: its norm by the median of the row, where that is largest.

    Attention sinks carry hidden states a hundred times as long as those of other tokens, in most layers, and nearly the
    same ones for every prompt: what a router makes of them says nothing about the prompt at hand.

    Args:
        norms: norm of the hidden state of each token of one row, padding left out, at several depths.
    """
    median = norms.median(dim=1, keepdim=True).values.clamp_min(torch.finfo(norms.dtype).tiny)
    return (norms / median).amax(dim=0)
