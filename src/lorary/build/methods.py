"""Which experts a build makes: the method and its own settings, and which options belong to which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.build.cluster_settings import CLUSTER_BY, ClusterSettings, parse_k
from lorary.build.jobs import read_overrides
from lorary.build.poly import PolySettings, poly_settings
from lorary.errors import UsageError

METHODS = ("private", "joint", "mbc", "poly", "mhr")
# Fields of `ClusterSettings` that only some ways to find clusters look at.
NEEDED_BY: Mapping[str, Sequence[str]] = {
    "method": ("mbc",),
    "private": ("mbc",),
    "private_steps": ("mbc",),
    "private_epochs": ("mbc",),
    "seed": ("mbc", "random", "text"),
}


@dataclass(frozen=True)
class MethodSettings:
    """How tasks are assigned to experts.

    Args:
        method: `private`, `joint`, `mbc`, `poly` or `mhr`.
        clusters: for mbc.
        poly: for poly and mhr.
        overrides: settings of single experts by name, see `lorary.build.jobs.override`.
        mu: for poly and mhr, also commit the mean of the skills.
        per_task: for poly and mhr, also commit the mixture of every task.
    """

    method: str = "private"
    clusters: ClusterSettings = field(default_factory=ClusterSettings)
    poly: PolySettings = field(default_factory=PolySettings)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mu: bool = False
    per_task: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method must be one of {', '.join(METHODS)}", found=self.method)
        if self.overrides and self.is_poly:
            raise UsageError("--overrides needs a method whose experts are trained apart", found=self.method)

    @property
    def is_poly(self) -> bool:
        """Whether the assignment is learnt."""
        return self.method in ("poly", "mhr")


def method_settings(
    method: str,
    preset: str,
    overrides: str | None,
    *,
    mbc: Mapping[str, Any],
    poly: Mapping[str, Any],
    mu: bool,
    per_task: bool,
    sampling: str | None = None,
) -> MethodSettings:
    """The settings of a method, from options of which None was not given. An option of another method is refused.

    Args:
        method: the method.
        preset: where it is the paper's, so is the way adapters are clustered.
        overrides: a file of overrides.
        mbc: options of `ClusterSettings`, k as text.
        poly: options of `PolySettings`.
        mu: as `MethodSettings.mu`.
        per_task: as `MethodSettings.per_task`.
        sampling: how tasks of one expert are met, which is nothing to a method whose experts have one each.

    Raises:
        UsageError: if a value is out of range, or an option belongs to another method.
    """
    given = {key: value for key, value in mbc.items() if value is not None}
    learnt = {**poly, "mu": mu or None, "per_task": per_task or None}
    is_poly, is_mbc = method in ("poly", "mhr"), method == "mbc"
    _refuse_foreign(method, "mbc", [] if is_mbc else list(given))
    _refuse_foreign(method, "poly or mhr", [] if is_poly else [k for k, v in learnt.items() if v is not None])
    _refuse_foreign(method, "joint, mbc, poly or mhr", ["sampling"] if sampling and method == "private" else [])
    _refuse_idle(given)
    if "k" in given:
        given["k"] = parse_k(given["k"])
    if preset == "paper-2024":
        given = {"method": "paper-2024", **given}
    return MethodSettings(
        method,
        ClusterSettings(**given),
        poly_settings(method, **poly) if is_poly else PolySettings(),
        read_overrides(overrides) if overrides else {},
        mu,
        per_task,
    )


def _refuse_foreign(method: str, owner: str, options: Sequence[str]) -> None:
    if options:
        raise UsageError(
            f"{_options(options)} needs --method {owner}", found=f"--method {method}", remedy="leave it out"
        )


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """Refuse options of clusters that the way clusters are found would not look at."""
    by = given.get("by", "mbc")
    idle = [key for key in given if by in CLUSTER_BY and by not in NEEDED_BY.get(key, CLUSTER_BY)]
    if idle:
        owners = " or ".join(NEEDED_BY[idle[0]])
        raise UsageError(f"{_options(idle)} needs --cluster-by {owners}", found=by, remedy="leave it out")


def _options(keys: Sequence[str]) -> str:
    # These are called otherwise on the command line than in the settings.
    words = {"by": "cluster-by", "method": "cluster-method", "seed": "cluster-seed"}
    return ", ".join(f"--{words.get(key, key.replace('_', '-'))}" for key in keys)
