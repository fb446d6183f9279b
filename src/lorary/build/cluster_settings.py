"""Settings of `--method mbc`: how tasks are assigned to clusters."""

from dataclasses import dataclass, replace

from lorary.build.settings import BuildSettings
from lorary.errors import UsageError
from lorary.numbers import check_count, check_number, check_seed

CLUSTER_BY = ("mbc", "random", "text", "family")
CLUSTER_METHODS = ("delta", "paper-2024")
# Passes over its rows that the paper gave a private adapter whose only use is to be clustered.
PRIVATE_EPOCHS = 2.0


@dataclass(frozen=True)
class ClusterSettings:
    """How `--method mbc` assigns tasks to experts.

    Args:
        k: number of clusters; several to choose among by validation loss; none to let the adapters themselves say.
        by: `mbc` (private adapters), `random`, `text` (embeddings of the prompts) or `family`.
        method: `delta` (updates, whatever their factors) or `paper-2024` (flattened factors, as the paper did).
        seed: of the clustering.
        private: library of the private adapters; one inside the library to be built where None.
        private_steps: optimiser steps of a private adapter; None takes `private_epochs`.
        private_epochs: passes over its rows; where both are None, see `private_settings`.
    """

    k: tuple[int, ...] = (10,)
    by: str = "mbc"
    method: str = "delta"
    seed: int = 42
    private: str | None = None
    private_steps: int | None = None
    private_epochs: float | None = None

    def __post_init__(self) -> None:
        for k in self.k:
            check_count("--k", k)
        check_seed("--cluster-seed", self.seed, most=2**32 - 1)  # of scikit-learn
        if self.private_steps is not None:
            check_count("--private-steps", self.private_steps, above=0)
        if self.private_epochs is not None:
            check_number("--private-epochs", self.private_epochs, above=0.0)
        if len(set(self.k)) != len(self.k):
            raise UsageError("--k must be auto, a number above 0, or several different ones", found=self.k)
        if self.by not in CLUSTER_BY:
            raise UsageError(f"--cluster-by must be one of {', '.join(CLUSTER_BY)}", found=self.by)
        if self.method not in CLUSTER_METHODS:
            raise UsageError(f"--cluster-method must be one of {', '.join(CLUSTER_METHODS)}", found=self.method)
        if not self.k and self.by != "mbc":
            raise UsageError("--k auto needs --cluster-by mbc", found=f"--cluster-by {self.by}")
        if None not in (self.private_steps, self.private_epochs):
            raise UsageError("--private-steps and --private-epochs must not be given together",
                             found=f"{self.private_steps}, {self.private_epochs}")  # fmt: skip

    def private_settings(self, settings: BuildSettings) -> BuildSettings:
        """Settings of the short private pass: 2 epochs (as the paper) where a build counts in epochs, else half.

        Args:
            settings: of the experts of the clusters.
        """
        if self.private_steps is not None:
            return replace(settings, steps=self.private_steps, epochs=None)
        if self.private_epochs is not None:
            return replace(settings, steps=None, epochs=self.private_epochs)
        if settings.epochs is not None:
            return replace(settings, epochs=min(PRIVATE_EPOCHS, settings.epochs))
        assert settings.steps is not None
        return replace(settings, steps=max(1, settings.steps // 2))


def parse_k(text: str) -> tuple[int, ...]:
    """`10`, `5,10,25`, or `auto` (an empty tuple).

    Raises:
        UsageError: if it is something else.
    """
    if text == "auto":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError("--k must be auto, a number, or several separated by commas", found=text) from error
