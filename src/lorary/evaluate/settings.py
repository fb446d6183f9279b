"""How to evaluate: routers as they are written, what they are given, and which rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import UsageError
from lorary.flags import check_flags, flag

# Routers are imported where they are looked up: they bring torch, which the help of a command does without.

# Fields of a setting that mean something to a router which looks at nothing.
_WITHOUT_LOOKING = ("allow", "general", "general_mode")


@dataclass(frozen=True)
class EvaluateSettings:
    """How to evaluate.

    Args:
        routers: which to score, separated by commas, with settings of their own in brackets: `arrow[top_k=2]`,
            `experts[a+b]`; or `oracle`, `oracle-or-base`, `best-single`, `random`; `base` is always there.
        top_k: experts per token and layer; a router with another default of its own keeps it, unless its brackets say.
        temperature: divides the scores.
        mix: `outputs` or `factors`.
        route: further fields of `lorary.route.setting.FIELDS`. Routers that look at nothing take those alone that say
            which experts there are; base and oracle take none, and a router with a preset in its brackets neither these
            nor the three above.
        units: by router, further fields in its own units, such as a default router's threshold; `route` comes first.
        template: how rows become prompts: `plain` or `chat`, as the experts were trained.
        max_length: tokens of a row; longer prompts lose their start.
        rows: use the first so many test rows of a task.
        oracle_rows: rows on which the oracle of a held-out task is chosen.
        template_rows: validation rows of each task on which the base's template is chosen.
        routing_rows: test rows of a held-in task whose routing is looked at; 0 for none.
        raw: rank options by their summed log-likelihood, not by the mean per token.
        allow_code: run generated programs, in a sandbox.
        unsafe_code: with --allow-code: run them even where nothing isolates them.

    Raises:
        RouterError: if there is no such router.
        UsageError: if a value is out of range.
    """

    routers: tuple[str, ...] = flag(("base", "uniform", "arrow", "oracle"), parse=str)
    top_k: int = 4
    temperature: float | Mapping[str, float] = 1.0
    mix: str = "outputs"
    route: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: str = "plain"
    max_length: int = flag(1024, least=1)
    rows: int = flag(100, least=1)
    oracle_rows: int = flag(16, least=1)
    template_rows: int = flag(8, least=1)
    routing_rows: int = flag(8, least=0)
    raw: bool = False
    allow_code: bool = False
    unsafe_code: bool = False

    def __post_init__(self) -> None:
        from lorary.route.setting import FIELDS
        from lorary.route.spec import REFERENCES, parse_spec

        # Kept as cells are called by.
        labels = dict.fromkeys(parse_spec(router).label for router in self.routers)
        object.__setattr__(self, "routers", tuple(labels))
        if chosen := {"router", "experts", "preset"} & set(self.route):
            raise UsageError(
                "an evaluation names its routers by --routers, and experts by the oracle", found=sorted(chosen)
            )
        if unknown := sorted(set(self.route) - set(FIELDS)):
            raise UsageError("an evaluation's route must have fields of a routing setting alone", found=unknown[0])
        for router in {*self.routers, "uniform"} - {*REFERENCES}:
            self.setting(router)  # checks the ranges
        if self.unsafe_code and not self.allow_code:
            raise UsageError("--unsafe-code only says how code may run", found="no --allow-code", remedy="give both")
        check_flags(self)

    def setting(self, router: str) -> Any:
        """What a router is asked for, as a `lorary.route.setting.Routing`.

        Args:
            router: as it is written; none of `REFERENCES`, which differ from task to task.
        """
        from lorary.route.presets import preset_fields
        from lorary.route.setting import Routing
        from lorary.route.spec import EXPERTS, parse_spec

        spec = parse_spec(router)
        if spec.name == EXPERTS:
            return Routing.of(experts=spec.experts, mix=self.mix)
        if "preset" in spec.fields:
            beside = {key: value for key, value in spec.fields.items() if key != "preset"}
            return Routing.of(**{**preset_fields(spec.fields["preset"]), "router": spec.name, **beside})
        return Routing.of(spec.name, **self._routing_fields(spec.name, spec.fields))

    def _routing_fields(self, router: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
        from lorary.route import ROUTERS

        looks = ROUTERS[router].weights is None
        if meaningless := sorted(set(overrides) - {*_WITHOUT_LOOKING} if not looks else ()):
            raise UsageError(
                f"router '{router}' looks at nothing and takes {list(_WITHOUT_LOOKING)} alone", found=meaningless
            )
        fields: dict[str, Any] = {"top_k": self.top_k, "temperature": self.temperature, "mix": self.mix}
        fields.update(ROUTERS[router].defaults)
        fields.update(self.units.get(router, {}) if looks else {})
        fields.update({key: value for key, value in self.route.items() if looks or key in _WITHOUT_LOOKING})
        return {**fields, **overrides}


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks of lm-evaluation-harness are evaluated.

    Args:
        harness: TASKS are names of lm-evaluation-harness, separated by commas.
        harness_path: with --harness: folder of further tasks.
        shots: with --harness: examples in each prompt; the task's own number by default.
        rows: the first so many rows of each task; all by default.
    """

    harness: bool = True
    harness_path: str | None = flag(None, metavar="DIR")
    shots: int | None = flag(None, least=0)
    rows: int | None = flag(None, least=1)

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass(frozen=True)
class ExplainSettings:
    """How prompts are explained.

    Args:
        against: compare with the choices of this router.
        without: take these experts out, one at a time; the most used by default.
        most: how many of the most used experts to take out.
        template: how prompts are written: `plain` or `chat`; as the experts were trained by default.
        max_new_tokens: most tokens of an answer that is not given.
    """

    against: str | None = flag(None, metavar="ROUTER")
    without: tuple[str, ...] | None = flag(None, metavar="EXPERT,...")
    most: int = flag(8, least=0)
    template: str | None = None
    max_new_tokens: int = flag(32, least=1)

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass(frozen=True)
class WhichSettings:
    """How prompts are answered side by side.

    Args:
        template: how prompts are written: `plain` or `chat`; as the experts were trained by default.
        max_new_tokens: most tokens of an answer.
    """

    template: str | None = None
    max_new_tokens: int = flag(16, least=1)

    def __post_init__(self) -> None:
        check_flags(self)
