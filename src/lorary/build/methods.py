"""Which experts a build makes: the method and its own settings, and which options belong to which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorary.build.cluster_settings import CLUSTER_BY, MBC, ClusterSettings, parse_k
from lorary.errors import UsageError
from lorary.flags import check_flags, flag, flags_of, option_of

POLY, MHR = "poly", "mhr"
METHODS = ("private", "joint", MBC, POLY, MHR)
MHR_SPLITS = 4
# Fields of `ClusterSettings` that only some ways to find clusters look at.
NEEDED_BY: Mapping[str, Sequence[str]] = {
    "method": ("mbc",),
    "private": ("mbc",),
    "private_steps": ("mbc",),
    "private_epochs": ("mbc",),
    "seed": ("mbc", "random", "text"),
}


@dataclass(frozen=True)
class PolySettings:
    """What decides a Poly or MHR model beside the settings of every build; recorded in the skills' provenance.

    Args:
        skills: skills that all tasks mix.
        splits: blocks of each layer with weights of their own; 1 is Poly, more is MHR.
        logits_learning_rate: peak learning rate of the assignment.
    """

    skills: int = flag(8, above=0, most=1 << 16, methods=(POLY, MHR))
    splits: int = flag(1, above=0, most=1 << 16, methods=(MHR,))
    logits_learning_rate: float = flag(0.1, above=0.0, methods=(POLY, MHR))

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def method(self) -> str:
        """`poly` or `mhr`."""
        return POLY if self.splits == 1 else MHR


def poly_settings(method: str, *, splits: int | None = None, **changes: Any) -> PolySettings:
    """The settings of a method by name.

    Args:
        method: `poly` or `mhr`.
        splits: 1 for Poly; for MHR 2 or more, 4 where None.
        changes: other fields of `PolySettings`; None keeps the default.

    Raises:
        UsageError: if method and splits disagree, or a value is out of range.
    """
    options = {key: value for key, value in changes.items() if value is not None}
    default = 1 if method == POLY else MHR_SPLITS
    settings = PolySettings(splits=default if splits is None else splits, **options)
    if settings.method != method:
        raise UsageError(
            "--method poly has 1 split and mhr has 2 or more",
            found=f"--method {method} --splits {splits}",
            remedy=f"--method {settings.method}",
        )
    return settings


@dataclass(frozen=True)
class MethodSettings:
    """How tasks are assigned to experts.

    Args:
        method: `private`, `joint`, `mbc`, `poly` or `mhr`.
        clusters: for mbc.
        poly: for poly and mhr.
        overrides: settings of single experts by name, see `lorary.build.jobs.override`.
        mu: also commit the mean of the skills.
        per_task: also commit the mixture of every task.
    """

    method: str = flag("private", choices=METHODS)
    clusters: ClusterSettings = field(default_factory=ClusterSettings)
    poly: PolySettings = field(default_factory=PolySettings)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mu: bool = flag(False, methods=(POLY, MHR))
    per_task: bool = flag(False, methods=(POLY, MHR))

    def __post_init__(self) -> None:
        check_flags(self)
        if self.overrides and self.is_poly:
            raise UsageError("--overrides needs a method whose experts are trained apart", found=self.method)

    @property
    def is_poly(self) -> bool:
        """Whether the assignment is learnt."""
        return self.method in (POLY, MHR)


def method_settings(
    method: str = "private",
    preset: str = "default",
    overrides: str | None = None,
    *,
    mbc: Mapping[str, Any],
    poly: Mapping[str, Any],
    mu: bool = False,
    per_task: bool = False,
    sampling: str | float | None = None,
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
    # It knows tasks and adapters, and so torch, which an option's help does without.
    from lorary.build.jobs import read_overrides

    options = {key: value for key, value in mbc.items() if value is not None}
    learnt = {**poly, "mu": mu or None, "per_task": per_task or None}
    is_poly, is_mbc = method in (POLY, MHR), method == MBC
    _refuse_foreign(method, MBC, [] if is_mbc else list(options))
    _refuse_foreign(method, "poly or mhr", [] if is_poly else [k for k, v in learnt.items() if v is not None])
    _refuse_foreign(method, "joint, mbc, poly or mhr", ["sampling"] if sampling and method == "private" else [])
    _refuse_idle(options)
    if "k" in options:
        options["k"] = parse_k(options["k"])
    if preset == "paper-2024":
        options = {"method": "paper-2024", **options}
    return MethodSettings(
        method,
        ClusterSettings(**options),
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


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """Refuse options of clusters that the way clusters are found would not look at."""
    by = options.get("by", "mbc")
    idle = [key for key in options if by in CLUSTER_BY and by not in NEEDED_BY.get(key, CLUSTER_BY)]
    if idle:
        owners = " or ".join(NEEDED_BY[idle[0]])
        raise UsageError(f"{_options(idle)} needs --cluster-by {owners}", found=by, remedy="leave it out")


def _options(keys: Sequence[str]) -> str:
    fields = flags_of(ClusterSettings)
    return ", ".join(option_of(ClusterSettings, key) if key in fields else f"--{key.replace('_', '-')}" for key in keys)
