"""Decisions that outlive one layer: of one layer for a token, and of a probe pass for a whole request."""

import torch
from torch import Tensor

from lorary.errors import RouterError, UsageError
from lorary.model.features import Featured
from lorary.ops.choose import Choice, choose


class TokenDecision:
    """What the deciding layer chose for the tokens of the running pass.

    Args:
        num_experts: of the library.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self._weights: Tensor | None = None

    def clear(self) -> None:
        """A new pass begins."""
        self._weights = None

    def write(self, experts: Tensor, weights: Tensor) -> None:
        """Keep what was decided.

        Args:
            experts: (local experts,), positions in the order of names.
            weights: (tokens, local experts).
        """
        full = weights.new_zeros(weights.shape[0], self.num_experts)
        self._weights = full.index_copy(1, experts, weights)

    def read(self, experts: Tensor, x: Tensor) -> Tensor | None:
        """The weights for another layer; None where nothing is decided yet.

        Args:
            experts: of that layer.
            x: (tokens, d_in), what it was given.

        Raises:
            RouterError: if it was given other tokens than the deciding layer.
        """
        if self._weights is None:
            return None
        if self._weights.shape[0] != x.shape[0]:
            raise RouterError(
                "per='token' needs layers that are all given the same tokens",
                found=f"{self._weights.shape[0]} tokens were decided, a later layer was given {x.shape[0]}",
                remedy="route every layer for itself: per='layer'",
            )
        return self._weights[:, experts].to(dtype=x.dtype, device=x.device)


class Request:
    """What was decided for each row of a batch: by the mean of the scores over real tokens and layers of a probe.

    A layer counts for an expert where the expert is seated, allowed and not zero.

    Args:
        num_experts: of the library.
        choice: what becomes of the mean scores.
        featured: scores by one vector of the prompt, in the place of the layers'.
    """

    def __init__(self, num_experts: int, choice: Choice, featured: Featured | None = None) -> None:
        self.num_experts, self.choice, self.featured = num_experts, choice, featured
        self.is_probing = False
        self.weights: Tensor | None = None

    def start(self, real: Tensor) -> None:
        """Begin a probe.

        Args:
            real: (rows, seq) bool, which tokens count.

        Raises:
            UsageError: if no token of a row counts.
        """
        if not bool(real.any(dim=1).all()):
            raise UsageError("each row must have a token to decide by", found="a row of padding alone")
        self.is_probing, self.weights, self._real = True, None, real
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
        self._sums[:, experts] += mean.masked_fill(~alive, 0.0).to(self._sums)
        self._layers[experts] += alive.to(place, self._layers.dtype)

    def see(self, hidden: Tensor, ids: Tensor | None) -> None:
        """What the probe came to, for scores that no layer gives.

        Args:
            hidden: (rows, seq, d), the decoder's last hidden states.
            ids: (rows, seq), where tokens were given as such.
        """
        if self.featured is not None:
            self._sums += self.featured.scores(hidden, ids, self._real.to(hidden.device)).to(self._sums)
            self._layers += self.featured.alive.to(self._layers)

    def finish(self) -> None:
        """Decide."""
        mean = self._sums / self._layers.clamp_min(1)
        self.weights = choose(mean.masked_fill(self._layers == 0, -torch.inf), self.choice)
        self.stop()

    def stop(self) -> None:
        """End the probe, also one that failed."""
        self.is_probing = False

    def read(self, experts: Tensor, x: Tensor, batch: int) -> Tensor:
        """The weights for one layer, (rows, local experts).

        Args:
            experts: of that layer.
            x: what it was given, for dtype and device.
            batch: rows of the pass.

        Raises:
            UsageError: if nothing was decided, or for another number of rows.
        """
        if self.weights is None or len(self.weights) != batch:
            decided = "nothing is decided" if self.weights is None else f"decided for {len(self.weights)} rows"
            raise UsageError(
                "per='request' needs a pass over the prompt, through the model, with the rows that follow",
                found=f"{decided}, a pass of {batch} rows",
                remedy="begin without a cache: the first pass of `generate` and `model(...)` do",
            )
        return self.weights[:, experts].to(dtype=x.dtype, device=x.device)
