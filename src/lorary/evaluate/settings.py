"""How to evaluate: routers as they are written, what they are given, and which rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorary.errors import UsageError
from lorary.numbers import check_count
from lorary.route import ROUTERS
from lorary.route.presets import preset_fields
from lorary.route.setting import FIELDS, Routing
from lorary.route.spec import EXPERTS, ORACLE, RouterSpec, parse_spec

# Fields of a setting that mean something to a router which looks at nothing.
_WITHOUT_LOOKING = ("allow", "general", "general_mode")


@dataclass(frozen=True)
class EvaluateSettings:
    """How to evaluate.

    Args:
        routers: as `lorary.route.spec` reads them; kept the one way to write them, which is what cells are called by.
            `base` is always there.
        top_k: experts per token and layer.
        temperature: divides the scores.
        mix: `outputs` or `factors`.
        route: further fields of `lorary.route.setting.FIELDS`. Routers that look at nothing take those alone that say
            which experts there are; base and oracle take none, and a router with a preset in its brackets neither these
            nor the three above.
        units: by router, further fields in its own units, such as a default router's threshold; `route` comes first.
        template: how rows become prompts; must be the one the experts were trained with.
        max_length: tokens of a row.
        rows: use the first so many test rows of a task.
        oracle_rows: rows on which the oracle of a held-out task is chosen.
        routing_rows: test rows of a held-in task whose routing is looked at; 0 for none.
        raw: rank options by the sum of their log-likelihood instead of the mean per token.
        allow_code: run what a model writes for tasks scored by `pass@k`, in a sandbox.
        unsafe_code: run it even where nothing isolates it.

    Raises:
        RouterError: if there is no such router.
        UsageError: if a value is out of range.
    """

    routers: tuple[str, ...] = ("base", "uniform", "arrow", "oracle")
    top_k: int = 4
    temperature: float | Mapping[str, float] = 1.0
    mix: str = "outputs"
    route: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    template: str = "plain"
    max_length: int = 1024
    rows: int = 100
    oracle_rows: int = 16
    routing_rows: int = 8
    raw: bool = False
    allow_code: bool = False
    unsafe_code: bool = False

    def __post_init__(self) -> None:
        labels = dict.fromkeys(parse_spec(router).label for router in self.routers)
        object.__setattr__(self, "routers", tuple(labels))
        if chosen := {"router", "experts", "preset"} & set(self.route):
            raise UsageError(
                "an evaluation names its routers by --routers, and experts by the oracle", found=sorted(chosen)
            )
        if unknown := sorted(set(self.route) - set(FIELDS)):
            raise UsageError("an evaluation's route must have fields of a routing setting alone", found=unknown[0])
        for router in {*self.routers, "uniform"} - {ORACLE}:
            self.setting(router)  # checks the ranges
        if self.unsafe_code and not self.allow_code:
            raise UsageError("--unsafe-code only says how code may run", found="no --allow-code", remedy="give both")
        for key, least in (("rows", 1), ("oracle_rows", 1), ("routing_rows", 0)):
            check_count(f"--{key.replace('_', '-')}", getattr(self, key), least=least)
        check_count("--max-length", self.max_length)

    def setting(self, router: str) -> Routing:
        """What a router is asked for.

        Args:
            router: as it is written; not the oracle, which differs from task to task.
        """
        spec = parse_spec(router)
        if spec.name == EXPERTS:
            return Routing.of(experts=spec.experts, mix=self.mix)
        if "preset" in spec.fields:
            own = {key: value for key, value in spec.fields.items() if key != "preset"}
            return Routing.of(**{**preset_fields(spec.fields["preset"]), "router": spec.name, **own})
        return Routing.of(spec.name, **self._asked(spec))

    def _asked(self, spec: RouterSpec) -> dict[str, Any]:
        looks = ROUTERS[spec.name].weights is None
        if meaningless := sorted(set(spec.fields) - {*_WITHOUT_LOOKING} if not looks else ()):
            raise UsageError(
                f"router '{spec.name}' looks at nothing and takes {list(_WITHOUT_LOOKING)} alone", found=meaningless
            )
        asked: dict[str, Any] = {"top_k": self.top_k, "temperature": self.temperature, "mix": self.mix}
        asked.update(self.units.get(spec.name, {}) if looks else {})
        asked.update({key: value for key, value in self.route.items() if looks or key in _WITHOUT_LOOKING})
        return {**asked, **spec.fields}
