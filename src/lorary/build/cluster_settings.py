"""Settings of `--method mbc`: how tasks are assigned to clusters."""

from dataclasses import dataclass, replace

from lorary.build.settings import BuildSettings
from lorary.errors import UsageError
from lorary.flags import check_flags, flag
from lorary.numbers import check_count, check_seed

MBC = "mbc"
CLUSTER_BY = (MBC, "random", "text", "family")
CLUSTER_METHODS = ("delta", "paper-2024")
# Passes over its rows that the paper gave a private adapter whose only use is to be clustered.
PRIVATE_EPOCHS = 2.0


@dataclass(frozen=True)
class ClusterSettings:
    """How `--method mbc` assigns tasks to experts.

    Args:
        k: number of clusters; several, as in 5,10,25, to choose by validation loss; `auto` lets the adapters say.
        by: what tasks are clustered by: `mbc` (private adapters), `random`, `text` (embeddings of the prompts) or
            `family`.
        method: how adapters are compared: `delta` (updates, whatever their factors) or `paper-2024` (flattened factors,
            as the paper did).
        seed: seed of the clustering.
        private: library of the private adapters, new or not; by default one inside the library to be built.
        private_steps: optimiser steps of a private adapter.
        private_epochs: passes of a private adapter over its rows, in place of `private_steps`.
    """

    k: tuple[int, ...] = flag((10,), metavar="K|auto", parse=str, methods=(MBC,))
    by: str = flag(MBC, option="--cluster-by", choices=CLUSTER_BY, methods=(MBC,))
    method: str = flag("delta", option="--cluster-method", choices=CLUSTER_METHODS, methods=(MBC,))
    seed: int = flag(42, option="--cluster-seed", methods=(MBC,))
    private: str | None = flag(None, metavar="LIB2", methods=(MBC,))
    private_steps: int | None = flag(None, above=0, methods=(MBC,))
    private_epochs: float | None = flag(None, above=0.0, methods=(MBC,))

    def __post_init__(self) -> None:
        for k in self.k:
            check_count("--k", k)
        check_seed("--cluster-seed", self.seed, most=2**32 - 1)  # of scikit-learn
        check_flags(self)
        if len(set(self.k)) != len(self.k):
            raise UsageError("--k must be auto, a number above 0, or several different ones", found=self.k)
        if not self.k and self.by != MBC:
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
