"""Decisions that outlive one layer: of one layer for a token, and of a probe pass for a whole request."""

import torch
from torch import Tensor

from lorary.errors import RouterError, UsageError
from lorary.model.fallback import Evidence
from lorary.model.features import Featured, mean_hidden
from lorary.model.seated import SeatedChoice
from lorary.ops.choose import Choice, Chosen, choose
from lorary.route.logo import last_tokens
from lorary.route.rule import Measures


class TokenDecision:
    """What the deciding layer chose for the tokens of the running pass."""

    def __init__(self) -> None:
        self._chosen: Chosen | None = None
        self._by: str | None = None

    def clear(self, *_pass: object) -> None:
        """A new pass begins; a forward pre-hook of the base's decoder."""
        self._chosen = self._by = None

    def falls_to(self, layer: str) -> bool:
        """Whether a layer that may decide has to.

        No other one has in this pass. The one that decided does so again where it runs again, as in the backward pass
        of gradient checkpointing.
        """
        return self._by is None or self._by == layer

    def write(self, experts: Tensor, chosen: Chosen, layer: str) -> None:
        """Keep what was decided.

        Args:
            experts: (local experts,), positions in the order of names.
            chosen: for each token, among these.
            layer: that decided.
        """
        self._chosen, self._by = Chosen(experts[chosen.experts], chosen.weights), layer

    def read(self, seats: Tensor, x: Tensor) -> Chosen | None:
        """What was decided, for another layer; None where nothing is yet.

        Args:
            seats: (experts,), where each expert sits in that layer, -1 where it does not.
            x: (tokens, d_in), what it was given.

        Raises:
            RouterError: if it was given other tokens than the deciding layer.
        """
        if self._chosen is None:
            return None
        if (num_tokens := len(self._chosen.experts)) != x.shape[0]:
            raise RouterError(
                "per='token' needs layers that are all given the same tokens",
                found=f"{num_tokens} tokens were decided, a later layer was given {x.shape[0]}",
                remedy="route every layer for itself: per='layer'",
            )
        return self._chosen.like(x).among(seats)


class Request:
    """What was decided for each row of a batch: by the mean of the scores over real tokens and layers of a probe.

    A layer counts for an expert where the expert is seated, allowed and not zero.

    Args:
        num_experts: of the library.
        choice: what becomes of the mean scores.
        measures: which of the real tokens count: all of them, or the last one.
        featured: scores by one vector of the prompt, in the place of the layers'.
        rule: name of the router.
        border: what is taken from all scores.
        fallback: (experts,) weights for a row in which no expert may be chosen, on the CPU; the base answers where
            None.
        evidence: for which of these rows the base in its own template would answer worse; for none where None.

    Attributes:
        chosen: the experts of each row, once it is decided.
        scores: (rows, experts) of each row; minus infinity for an expert that may not be chosen.
        is_lost: (rows,) bool, whether no expert could be chosen.
        prefers_mean: (rows,) bool, whether `evidence` speaks for the fallback's weights.
    """

    def __init__(
        self,
        num_experts: int,
        choice: Choice,
        measures: Measures = "mean",
        featured: Featured | None = None,
        rule: str = "",
        border: float = 0.0,
        fallback: Tensor | None = None,
        evidence: Evidence | None = None,
    ) -> None:
        self.num_experts, self.choice, self.measures, self.featured = num_experts, choice, measures, featured
        self.rule, self.border, self.evidence = rule, border, evidence
        self.fallback = None if fallback is None else Chosen.of(fallback)
        self.is_probing = False
        self.chosen: Chosen | None = None
        self.scores: Tensor | None = None
        self.is_lost = torch.empty(0, dtype=torch.bool)
        self.prefers_mean: Tensor | None = None
        self._has_tokens: Tensor | None = None
        self._seated: SeatedChoice | None = None

    def start(self, real: Tensor) -> None:
        """Begin a probe.

        Args:
            real: (rows, seq) bool, which tokens count.
        """
        self._has_tokens = real.any(dim=1).all()
        self._real = last_tokens(real) if self.measures == "last" else real
        self.is_probing, self.chosen = True, None
        self._sums = torch.zeros(len(real), self.num_experts, dtype=torch.float64, device=real.device)
        self._layers = torch.zeros(self.num_experts, dtype=torch.int64, device=real.device)

    def add(self, experts: Tensor, scores: Tensor, alive: Tensor) -> None:
        """Count one layer.

        Args:
            experts: of the layer, as positions in the order of names.
            scores: (rows, seq, local experts).
            alive: (local experts,) bool.
        """
        real = self._real.to(scores.device)[..., None]
        mean = scores.masked_fill(~real, 0.0).sum(dim=1) / real.sum(dim=1)
        place = self._sums.device
        experts = experts.to(place)  # of a model on several devices, layers lie on others than the prompt
        self._sums[:, experts] += mean.masked_fill(~alive, 0.0).to(self._sums)
        self._layers[experts] += alive.to(place, self._layers.dtype)

    def see(self, hidden: Tensor, ids: Tensor | None) -> bool:
        """What the first layers of the probe made of the prompts, for scores that no layer gives.

        Args:
            hidden: (rows, seq, d), hidden states behind them.
            ids: (rows, seq), where tokens were given as such.

        Returns:
            Whether all is decided, so that the probe may stop.

        Raises:
            UsageError: if no token of a row counts.
        """
        if self.featured is None:
            return False
        self.featured = self.featured.to(hidden.device)  # from the first request there on: it can be large
        self._sums += self.featured.scores(hidden, ids, self._real.to(hidden.device)).to(self._sums)
        self._layers += self.featured.alive.to(self._layers)
        self._decide()
        return self.evidence is None or not self._look(self.is_lost.any())

    def finish(self, hidden: Tensor | None) -> None:
        """Decide, unless that is done, and weigh the evidence on requests that no expert fits.

        Args:
            hidden: (rows, seq, d), the decoder's last hidden states; None where the probe stopped before.

        Raises:
            UsageError: if no token of a row counts.
        """
        if self.featured is None:
            self._decide()
        if self._has_tokens is not None:
            self._look(self._has_tokens)
        self.prefers_mean = torch.zeros_like(self.is_lost)
        if self.evidence is not None and hidden is not None:
            self.evidence = self.evidence.to(hidden.device)
            vectors = mean_hidden(hidden, self._real.to(hidden.device))
            self.prefers_mean = self.is_lost & self.evidence.prefers_mean(vectors).to(self.is_lost.device)
        self.stop()

    def _look(self, flag: Tensor) -> bool:
        """A flag, and whether all rows have tokens, in one look: on a device, each makes the host wait."""
        assert self._has_tokens is not None
        has_tokens, value = torch.stack([self._has_tokens, flag]).tolist()
        self._has_tokens = None
        if not has_tokens:
            raise UsageError("each row must have a token to decide by", found="a row of padding alone")
        return bool(value)

    def _decide(self) -> None:
        mean = self._sums / self._layers.clamp_min(1) - self.border
        self.scores = mean.masked_fill(self._layers == 0, -torch.inf)
        chosen = choose(self.scores, self.choice)
        self.is_lost = ~chosen.weights.any(dim=1)
        self.chosen = chosen if self.fallback is None else chosen.or_else(self.fallback)

    @property
    def most(self) -> int:
        """Experts of a row at most: of those that were decided, or of any; a fallback may bring more than `choice`."""
        if self.chosen is not None:
            return self.chosen.experts.shape[1]
        num_fallback = 0 if self.fallback is None else self.fallback.experts.shape[1]
        return max(self.choice.most(self.num_experts), num_fallback)

    def stop(self) -> None:
        """End the probe, also one that failed."""
        self.is_probing = False

    def decided(self, batch: int) -> SeatedChoice:
        """What was decided, for each row of a pass.

        Args:
            batch: rows of the pass.

        Raises:
            UsageError: if nothing was decided, or for another number of rows.
        """
        if self.chosen is None or len(self.chosen.experts) != batch:
            decided = "nothing is decided" if self.chosen is None else f"decided for {len(self.chosen.experts)} rows"
            raise UsageError(
                "per='request' needs a pass over the prompt, through the model, with the rows that follow",
                found=f"{decided}, a pass of {batch} rows",
                remedy="begin without a cache: the first pass of `generate` and `model(...)` do",
            )
        settled = self.settled
        assert settled is not None
        return settled

    @property
    def settled(self) -> SeatedChoice | None:
        """What was decided, the same object until that is decided anew; None while it is not."""
        if self.is_probing or self.chosen is None:
            return None
        if self._seated is None or self._seated.chosen is not self.chosen:
            self._seated = SeatedChoice(self.chosen)
        return self._seated
