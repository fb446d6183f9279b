"""The arithmetic floor of a routed forward pass: what no implementation of a rule can leave out.

Counted are the base's linear layers, its head and its attention; the products that a rule scores with (one row per
expert, or the low-rank buffer and its small matrices); and the chosen experts. `Routed.ratio` counts multiply-adds.
`Extras.seconds` takes time instead: the bare matrix products of the same shapes beside the base, all tokens through
the same k experts, over weights of their own in each layer, so that decoding reads from memory what it has to read.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from floor import find_products
from torch import Tensor

from lorary.lora.targets import num_layers
from lorary.route.rule import Rule

Shape = tuple[int, int]


@dataclass(frozen=True)
class Routed:
    """What a router does in every adapted layer.

    Args:
        rule: of the catalogue; None for experts named by the caller.
        experts: seated, or named where there is no rule.
        rank: of every expert.
        top_k: experts per token.
        candidates: experts that pass the first stage of a rule that reads both rows and small matrices.
    """

    rule: Rule | None
    experts: int
    rank: int = 4
    top_k: int = 4
    candidates: int = 20

    def products(self, d_in: int, d_out: int) -> list[Shape]:
        """(in, out) of the products that one token needs in a layer beside the layer's own."""
        if self.rule is None or self.rule.weights is not None:
            ranks = self.num_fixed * self.rank
            return [(d_in, ranks), (ranks, d_out)] if ranks else []
        has_rows, has_matrices = "score_rows" in self.rule.reads, bool(self.rule.reads & {"row_space", "outputs"})
        chosen = min(self.top_k, self.experts)
        projected = chosen
        if has_matrices:
            projected = min(self.candidates, self.experts) if has_rows else self.experts
        shapes = [(d_in, self.experts)] if has_rows else []
        shapes.append((d_in, projected * self.rank))
        if has_matrices:
            shapes.append((projected * self.rank, self.rank))
        return [*shapes, (chosen * self.rank, d_out)]

    @property
    def num_fixed(self) -> int:
        """Experts that act on every token, where nothing is looked at."""
        if self.rule is None or self.rule.weights is None:
            return self.experts
        names = [str(index) for index in range(self.experts)]
        return int(self.rule.weights(names).count_nonzero())

    def count(self, targets: Mapping[str, Shape]) -> int:
        """Multiply-adds of one token in all adapted layers."""
        return sum(a * b for shape in targets.values() for a, b in self.products(*shape))


def base_count(model: Any, context: float) -> float:
    """Multiply-adds of one token in the bare base.

    Args:
        model: the base.
        context: tokens that a token attends to, on average.
    """
    base, head = find_products(model, set())
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 2.0 * context * int(width) * num_layers(model)
    return sum(product.weight.numel() for product in (*base, head)) + attention


class Extras:
    """The bare products of a router for some tokens, timed.

    Args:
        routed: the router.
        targets: (d_in, d_out) by path of the adapted layers.
        pool: numbers that the weights are windows of; as many as `pool_size` says.
        tokens: tokens of a pass.
    """

    def __init__(self, routed: Routed, targets: Mapping[str, Shape], pool: Tensor, tokens: int) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        inputs: dict[int, Tensor] = {}
        start = 0
        for a, b in _all_products([routed], targets):
            x = inputs.setdefault(a, torch.randn(tokens, a))
            self._pairs.append((x, pool[start : start + a * b].view(b, a).mT))
            start += a * b

    @torch.no_grad()
    def seconds(self) -> float:
        """Seconds of all products, once."""
        start = time.perf_counter()
        for x, weight in self._pairs:
            torch.mm(x, weight)
        return time.perf_counter() - start


def pool_size(routed: Sequence[Routed], targets: Mapping[str, Shape]) -> int:
    """Numbers that the weights of the largest of some routers take."""
    return max((sum(a * b for a, b in _all_products([one], targets)) for one in routed), default=0)


def _all_products(routed: Iterable[Routed], targets: Mapping[str, Shape]) -> Iterable[Shape]:
    return (shape for one in routed for d_in, d_out in targets.values() for shape in one.products(d_in, d_out))
