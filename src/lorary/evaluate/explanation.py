"""What is known of how some prompts were routed; statistics follow from it, text and page show it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorary.errors import RouterError, ShapeError, UsageError
from lorary.evaluate.routing import ExpertUse, Measures, RoutingAgreement, agreement, as_shares, expert_use, measure
from lorary.lora.targets import place_of
from lorary.tabular import ResultTable, Tabular


class SeenToken(NamedTuple):
    """A token that the model read.

    Args:
        text: what it adds; a character of several tokens stands at its last one, and those before it are empty.
        part: `prompt` or `answer`.
        left_out: why it is kept out of statistics, empty where it counts.
    """

    text: str
    part: str
    left_out: str


@dataclass(frozen=True)
class SeenPrompt:
    """One prompt and its answer.

    Args:
        prompt: the text.
        answer: the text that was given, or that the routed model made.
        is_given: whether it was given.
        is_finished: whether it ends as the model ends an answer; a made one may have been cut.
        num_answer: tokens of the answer, the one that ends it counted.
        tokens: all that the model read: prompt and answer but for its last token.
        weights: routing weights; None under a router that decides nothing.
        against: those under the other router; None without one, or where it decides nothing.
    """

    prompt: str
    answer: str
    is_given: bool
    is_finished: bool
    num_answer: int
    tokens: Sequence[SeenToken]
    weights: Float[Tensor, "layers tokens experts"] | None
    against: Float[Tensor, "layers tokens experts"] | None = None

    @property
    def counted(self) -> Tensor:
        """(tokens,) bool: which of them statistics are about."""
        return torch.tensor([not token.left_out for token in self.tokens])


class Compared(NamedTuple):
    """The log-likelihood of the answers under another setting, beside that under the router.

    Args:
        name: an expert that was taken out, or a router.
        log_likelihood: of each prompt's answer, in nats.
        change: its sum minus the router's: below 0 where the answers are less likely under the other setting.
        per_token: the same for each token of the answers.
    """

    name: str
    log_likelihood: Sequence[float]
    change: float
    per_token: float


class LayerGroup(NamedTuple):
    """Layers that are summed up together."""

    name: str
    measures: Measures
    agreement: RoutingAgreement | None


@dataclass(frozen=True, repr=False)
class Explanation(Tabular):
    """How a routed library treated some prompts.

    Args:
        library: its name.
        base_model: the base's name.
        template: how prompts were put.
        router: what it is called.
        settings: of the router, values of JSON.
        experts: names, in the order of the weights' last axis.
        layers: paths of the layers that decide, in the model's order; none where the router decides nothing.
        reach: whether an expert may be chosen in a layer.
        prompts: at least one.
        fixed: weight of each expert where the router decides nothing, else None.
        log_likelihood: of each prompt's answer under the router, in nats.
        base: of the bare base, by prompt.
        without: of the router without an expert, by expert and prompt.
        against: the other router's name and log-likelihoods.

    Raises:
        ShapeError: if tokens, layers or experts do not fit the weights.
        RouterError: if a weight or a log-likelihood is not finite; names the layer.
        UsageError: if no token is left to count.
    """

    library: str
    base_model: str
    template: str
    router: str
    settings: Mapping[str, Any]
    experts: Sequence[str]
    layers: Sequence[str]
    reach: Bool[Tensor, "layers experts"]
    prompts: Sequence[SeenPrompt]
    fixed: Mapping[str, float] | None
    log_likelihood: Sequence[float]
    base: Sequence[float]
    without: Mapping[str, Sequence[float]] = field(default_factory=dict)
    against: tuple[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            for weights in (prompt.weights, prompt.against):
                _check_weights(weights, self.layers, len(prompt.tokens), len(self.experts))
        scored = {"the router": self.log_likelihood, "the base": self.base, **self.without}
        if self.against:
            scored[self.against[0]] = self.against[1]
        for name, values in scored.items():
            if not bool(torch.tensor(values).isfinite().all()):
                raise RouterError(f"the log-likelihood of an answer must be finite, under '{name}' too", found=values)
        if self.decides and not any(bool(prompt.counted.any()) for prompt in self.prompts):
            raise UsageError(
                "statistics need a token that counts: the first of a row never does",
                found=f"{sum(len(prompt.tokens) for prompt in self.prompts)} tokens, all left out",
                remedy="a longer prompt",
            )

    def tables(self) -> list[ResultTable]:
        """The prompts with their answers, and the experts."""
        scores = zip_longest(self.prompts, self.log_likelihood, self.base)  # there are none before answers are scored
        prompts = [
            (each.prompt, each.answer, "given" if each.is_given else "made", routed, base)
            for each, routed, base in scores
        ]
        heads = ("prompt", "answer", "it was", "log-likelihood", "of the base")
        records = self.records()
        experts = [list(record.values()) for record in records]
        return [
            ResultTable(f"{self.router} over {self.library}", heads, prompts),
            ResultTable("experts, the most used first", list(records[0]) if records else [], experts),
        ]

    def records(self) -> list[dict[str, Any]]:
        """One mapping for each expert, the most used first: how it fares, and what the answers lose without it."""
        change = {each.name: each.change for each in self.without_each}
        shares: list[dict[str, Any]]
        if self.fixed is not None:
            shares = [{"weight": self.fixed.get(name, 0.0)} for name in self.experts]
        else:
            shares = [{"usage": use.usage, "chosen": use.chosen, "strongest": use.leads, "layers": use.layers,
                       "remark": use.verdict} for use in self.uses]  # fmt: skip
        return [
            {"expert": self.experts[i], **shares[i], "change without": change.get(self.experts[i])}
            for i in self.ranked()
        ]

    @property
    def decides(self) -> bool:
        """Whether the router looks at tokens, so that there is anything to see."""
        return self.fixed is None

    @property
    def compares(self) -> bool:
        """Whether there are choices of two routers to compare."""
        return any(prompt.against is not None for prompt in self.prompts)

    @cached_property
    def shares(self) -> Float[Tensor, "layers tokens outcomes"]:
        """Shares of all tokens that count, the prompts one after the other."""
        return self._pooled("weights")

    @cached_property
    def uses(self) -> list[ExpertUse]:
        """How each expert fares."""
        return expert_use(self.shares, self.reach)

    @cached_property
    def overall(self) -> LayerGroup:
        """All layers."""
        return self._group("all layers", range(len(self.layers)))

    @cached_property
    def by_layer(self) -> list[LayerGroup]:
        """Each layer, by its path."""
        return [self._group(path, [i]) for i, path in enumerate(self.layers)]

    @cached_property
    def by_depth(self) -> list[LayerGroup]:
        """The layers of one number together; `-` for those without one."""
        return self._grouped([place_of(path)[1] for path in self.layers])

    @cached_property
    def by_module(self) -> list[LayerGroup]:
        """The layers of one kind together."""
        return self._grouped([place_of(path)[0] for path in self.layers])

    def ranked(self) -> list[int]:
        """Experts by usage, or by the size of their fixed weight, the first of equals first."""
        if self.fixed is not None:
            size = [abs(self.fixed.get(name, 0.0)) for name in self.experts]
        else:
            size = self.overall.measures.usage.tolist()
        return sorted(range(len(self.experts)), key=lambda i: -size[i])

    @cached_property
    def without_each(self) -> list[Compared]:
        """The experts that were taken out, those that the answers need most first."""
        return sorted(
            (self._compared(*item) for item in self.without.items()), key=lambda comparison: comparison.change
        )

    @property
    def against_base(self) -> Compared:
        """The bare base."""
        return self._compared("base", self.base)

    @property
    def against_other(self) -> Compared | None:
        """The other router, where there is one."""
        return None if self.against is None else self._compared(*self.against)

    @property
    def num_answer(self) -> int:
        """Tokens of all answers."""
        return sum(prompt.num_answer for prompt in self.prompts)

    def _compared(self, name: str, values: Sequence[float]) -> Compared:
        change = sum(values) - sum(self.log_likelihood)
        return Compared(name, list(values), change, change / self.num_answer)

    @cached_property
    def _other_shares(self) -> Tensor:
        return self._pooled("against")

    def _pooled(self, attribute: str) -> Tensor:
        weights = [getattr(prompt, attribute)[:, prompt.counted] for prompt in self.prompts]
        return as_shares(torch.cat(weights, dim=1))

    def _grouped(self, labels: Sequence[str]) -> list[LayerGroup]:
        names = list(dict.fromkeys(labels))
        return [self._group(name, [i for i, label in enumerate(labels) if label == name]) for name in names]

    def _group(self, name: str, layers: Sequence[int]) -> LayerGroup:
        shares = self.shares[list(layers)].flatten(0, 1)
        if not self.compares:
            return LayerGroup(name, measure(shares), None)
        return LayerGroup(name, measure(shares), agreement(shares, self._other_shares[list(layers)].flatten(0, 1)))


def _check_weights(weights: Tensor | None, layers: Sequence[str], tokens: int, experts: int) -> None:
    if weights is None:
        return
    if tuple(weights.shape) != (len(layers), tokens, experts):
        raise ShapeError(
            f"routing weights must be (layers, tokens, experts) = {(len(layers), tokens, experts)}",
            found=tuple(weights.shape),
        )
    for path, layer_weights in zip(layers, weights, strict=True):
        if not bool(layer_weights.isfinite().all()):
            raise RouterError(
                f"routing weights must be finite numbers, at layer '{path}' too",
                found="NaN",
                remedy="lorary library verify; with half precision, --dtype float32",
            )
