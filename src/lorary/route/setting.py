"""The settings of one router: which rule, what becomes of its scores, when it decides, how experts are mixed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, get_args

from lorary.axes import layer_number
from lorary.errors import RouterError, UsageError, did_you_mean
from lorary.numbers import MOST_COUNT, is_number, shown
from lorary.ops.choose import Choice, Mix, Scale
from lorary.ops.normalise import InputNorm
from lorary.route import ROUTERS
from lorary.route.general_subtraction import GeneralMode
from lorary.route.rule import Data, Decides, Features, Per, Rule

# Larger ones are slips: their squares, which the base's norms take, leave what float32 holds, and no number shows it.
MOST_WEIGHT = 1e6
# The fields of the flat spelling, in the order in which they are written, and where `Routing` holds each. It is the
# spelling of library.json, `--route`, brackets, `lorary.attach` and `lorary.routing`.
FIELDS: Mapping[str, str] = {
    "router": "router", "top_k": "choosing.top_k", "temperature": "choosing.temperature", "mix": "mix",
    "experts": "experts", "top_p": "choosing.top_p", "threshold": "choosing.threshold", "scale": "choosing.scale",
    "null": "choosing.null", "input_norm": "options.input_norm", "per": "per", "at": "at", "allow": "allow",
    "candidates": "options.candidates", "calibrated": "options.calibrated", "tie": "options.tie",
    "zeros": "options.zeros", "features": "options.features", "general": "general.experts",
    "general_mode": "general.mode", "fallback": "fallback",
}  # fmt: skip
UNIFORM, CHAT = "uniform", "chat"
# The fields there were from the start: they are always written.
_FIRST_FIELDS = ("router", "top_k", "temperature", "mix", "experts")


@dataclass(frozen=True)
class Choosing:
    """How scores become routing weights; `lorary.ops.choose.Choice` says more of each step.

    Args:
        top_k: experts per token and layer, at least 1, clamped to the number there is.
        temperature: divides the scores, above 0; or one for each layer, by the path of a routed layer or the number
            of a transformer layer (a path wins), 1 for those not named.
        top_p: the fewest best ones whose softmax reaches this mass.
        threshold: the lowest score with which an expert may be chosen.
        scale: what becomes of the chosen scores; the rule's own where None.
        null: the score of the base.

    Raises:
        UsageError: if a value is out of range.
    """

    top_k: int = 4
    temperature: float | Mapping[Any, float] = 1.0
    top_p: float | None = None
    threshold: float | None = None
    scale: Scale | None = None
    null: float | None = None

    def __post_init__(self) -> None:
        by_layer = self.temperature if isinstance(self.temperature, Mapping) else {"": self.temperature}
        for temperature in by_layer.values():
            self._choice(temperature, "softmax")

    def choice(self, path: str, scale: Scale) -> Choice:
        """The steps in one layer.

        Args:
            path: of a routed layer; the empty string asks for no layer in particular.
            scale: the rule's own.
        """
        if not isinstance(self.temperature, Mapping):
            return self._choice(self.temperature, scale)
        by_key = {str(key): value for key, value in self.temperature.items()}
        return self._choice(by_key.get(path, by_key.get(str(layer_number(path)), 1.0)), scale)

    def _choice(self, temperature: float, scale: Scale) -> Choice:
        return Choice(
            self.top_k, self.top_p, self.threshold, temperature, scale if self.scale is None else self.scale, self.null
        )


@dataclass(frozen=True)
class RuleOptions:
    """What a rule can be asked for beside; `Routing` refuses an option that its rule does not have.

    Args:
        input_norm: what is done to hidden states before scoring, and for scoring alone: `none`, `unit` or `layer`.
        candidates: for routers of two stages, how many experts pass the first, clamped to the number there is.
        calibrated: score by how unusual a norm is for its expert; needs prepared means and deviations.
        tie: `concat`: q, k and v of one attention share a prototype, that of their stacked updates.
        zeros: `skip`: an expert whose update is zero is never chosen. `keep`: it is known by its lora_a.
        features: what a router for whole requests reads of a prompt. `hidden`: the mean of the base's hidden
            states behind its first layers. `text`: the vector of a sentence encoder, for which the text is made from
            the tokens.

    Raises:
        UsageError: if a value is not one of these.
    """

    input_norm: InputNorm = "none"
    candidates: int = 20
    calibrated: bool = False
    tie: str = "none"
    zeros: str = "skip"
    features: Features = "hidden"

    def __post_init__(self) -> None:
        _check_word("input_norm", self.input_norm, get_args(InputNorm))
        _check_word("tie", self.tie, ("none", "concat"))
        _check_word("zeros", self.zeros, ("skip", "keep"))
        _check_word("features", self.features, get_args(Features))
        if type(self.calibrated) is not bool:
            raise UsageError("calibrated must be true or false", found=repr(self.calibrated))
        if type(self.candidates) is not int or not 1 <= self.candidates <= MOST_COUNT:
            raise UsageError("candidates must be a whole number of at least 1", found=shown(self.candidates))

    @property
    def changes_prototypes(self) -> bool:
        """Whether prototypes differ from those of each layer's own updates."""
        return (self.tie, self.zeros) != ("none", "skip")


@dataclass(frozen=True)
class General:
    """Experts that stand for what all have in common.

    Args:
        experts: they are never chosen, and each other one acts and is scored without the mean of them; None for none.
        mode: `delta`: the mean of their updates is taken away. `factors`: the means of their factors are.

    Raises:
        UsageError: if these are no names, or there is no such mode.
    """

    experts: Sequence[str] | None = None
    mode: GeneralMode = "delta"

    def __post_init__(self) -> None:
        _check_word("general_mode", self.mode, get_args(GeneralMode))
        _check_names("general", self.experts, "leave it out to take nothing away")


@dataclass(frozen=True)
class Routing:
    """Settings of one router.

    Args:
        router: a name in `lorary.route.ROUTERS`; ignored where `experts` names them.
        mix: `outputs` (the weighted sum of the experts' updates) or `factors` (the product of weighted factors).
        experts: experts with a fixed weight each; given names alone, they share the weight 1.
        per: when it decides. `layer`: each token in each layer. `token`: each token once, at one layer, for all later
            ones. `request`: each row once, from a pass of the bare base over its prompt, for all layers and tokens.
            None: as the rule does by itself.
        at: with per='token', the path of the layer that decides; the routed one that runs first where None. For logo,
            that of the layer it looks at; the query projection of the last routed block where None.
        allow: the experts that may be used at all; all where None.
        choosing: how scores become weights.
        options: of the rule.
        general: experts that are taken away from the others.
        fallback: what answers a request in which no expert reaches the threshold: `uniform`, the mean of all experts
            that may be used; `chat`, the base model in its own chat template, where it has one and the caller knows
            the prompt's text, else as `uniform`; the name of an expert; the base model as it is where None.

    Raises:
        RouterError: if there is no such router or mix, or the router cannot do what is asked.
        UsageError: if a value is out of range or makes no sense beside another.
    """

    router: str = "arrow"
    mix: Mix = "outputs"
    experts: Mapping[str, float] | Sequence[str] | None = None
    per: Per | None = None
    at: str | None = None
    allow: Sequence[str] | None = None
    choosing: Choosing = field(default_factory=Choosing)
    options: RuleOptions = field(default_factory=RuleOptions)
    general: General = field(default_factory=General)
    fallback: str | None = None

    def __post_init__(self) -> None:
        if self.experts is None and (not isinstance(self.router, str) or self.router not in ROUTERS):
            raise RouterError(
                "a router must exist",
                found=self.router if isinstance(self.router, str) else shown(self.router),
                remedy=did_you_mean(str(self.router), ROUTERS, remedy=f"one of {list(ROUTERS)}, or experts=[...]"),
            )
        if self.mix not in get_args(Mix):
            raise RouterError(f"mix must be one of {list(get_args(Mix))}", found=self.mix)
        _check_word("per", self.per, (None, *get_args(Per)))
        if self.experts is not None:
            _check_experts(self.experts)
            _check_signs(self)
        _check_allow(self)
        _check_general(self)
        _check_per(self)
        _check_fallback(self)
        if self._rule is not None:
            _check_options(self, self._rule)

    @classmethod
    def of(cls, router: str = "arrow", **fields: Any) -> "Routing":
        """Settings from their flat spelling.

        >>> Routing.of("arrow", top_k=2).choosing.top_k
        2

        Args:
            router: the router.
            fields: others of `FIELDS`; what is left out has its default.

        Raises:
            RouterError: as for the class.
            UsageError: as for the class, or if there is no such field.
        """
        return cls(**parts_of({"router": router, **fields}))

    def fields(self) -> dict[str, Any]:
        """The settings in their flat spelling."""
        return {key: attrgetter(place)(self) for key, place in FIELDS.items()}

    def changed(self, **fields: Any) -> "Routing":
        """The same settings but for some fields of the flat spelling."""
        return Routing.of(**{**self.fields(), **fields})

    @property
    def fixed(self) -> dict[str, float] | None:
        """Weight by expert where experts are named, else None."""
        if self.experts is None or isinstance(self.experts, Mapping):
            return None if self.experts is None else dict(self.experts)
        return {name: 1.0 / len(self.experts) for name in self.experts}

    def may_choose(self, expert: str) -> bool:
        """Whether an expert may get a weight."""
        return (self.allow is None or expert in self.allow) and expert not in (self.general.experts or ())

    @property
    def named(self) -> set[str]:
        """All experts that the setting names."""
        last = () if self.fallback in (None, UNIFORM, CHAT) else (str(self.fallback),)
        return {*(self.fixed or ()), *(self.allow or ()), *(self.general.experts or ()), *last}

    @property
    def decides(self) -> Decides:
        """When it decides: as `per` says, else as the rule does by itself; `always` where nothing is scored."""
        rule = self._rule
        if rule is None or rule.weights is not None:
            return "always"
        return self.per or rule.decides

    @property
    def is_calibrated(self) -> bool:
        """Whether scores are read against prepared means and deviations."""
        return self.data is not None and self.data.holds == "moments"

    @property
    def data(self) -> Data | None:
        """What it needs beyond the adapters' weights; None where it needs nothing."""
        data = None if self._rule is None else self._rule.data
        return None if data is None or (data.is_optional and not self.options.calibrated) else data

    @property
    def data_kind(self) -> str | None:
        """The name under which a library keeps that data; None where it needs none."""
        return None if self.data is None else self.data.kind_of(self.options.features)

    @property
    def editions(self) -> dict[str, int]:
        """Editions of the rules that decide, those alone that are later than the first: what is kept by them is."""
        rule = self._rule
        names = () if rule is None else (self.router, *rule.tries)
        return {name: ROUTERS[name].edition for name in names if ROUTERS[name].edition > 1}

    @property
    def _rule(self) -> Rule | None:
        return None if self.experts is not None else ROUTERS.get(self.router)

    def choice(self, path: str) -> Choice:
        """How scores become weights in one layer; the empty path asks for no layer in particular."""
        return self.choosing.choice(path, "softmax" if self._rule is None else self._rule.scale)

    def to_json(self) -> dict[str, Any]:
        """The flat spelling as values of JSON: the first five fields, and those others that differ from defaults."""
        default, fields = Routing().fields(), self.fields()
        if isinstance(self.choosing.temperature, Mapping):
            fields["temperature"] = {str(key): value for key, value in self.choosing.temperature.items()}
        return {
            key: dict(value)
            if isinstance(value, Mapping)
            else list(value)
            if isinstance(value, (list, tuple))
            else value
            for key, value in fields.items()
            if key in _FIRST_FIELDS or value != default[key]
        }


def parts_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `Routing` is made of, from the flat spelling; each part checks itself, and whether a rule can do it does not
    matter yet.

    Raises:
        UsageError: if there is no such field, or a value of a part is out of range.
    """
    if unknown := [key for key in fields if key not in FIELDS]:
        remedy = f"it has {list(FIELDS)}"
        raise UsageError("a routing setting must have known fields only", found=unknown, remedy=remedy)
    parts: dict[str, dict[str, Any]] = {"": {}, "choosing": {}, "options": {}, "general": {}}
    for key, value in fields.items():
        part, _, name = FIELDS[key].rpartition(".")
        parts[part][name] = value
    return {
        **parts[""],
        "choosing": Choosing(**parts["choosing"]),
        "options": RuleOptions(**parts["options"]),
        "general": General(**parts["general"]),
    }


def _check_word(name: str, word: Any, words: Sequence[str | None]) -> None:
    if word not in words:
        raise UsageError(f"{name} must be one of {list(words)}", found=repr(word))


def _check_names(name: str, experts: Any, remedy: str) -> None:
    if experts is not None and not (experts and _are_names(experts)):
        raise UsageError(
            f"{name} must be a list of different experts, at least one", found=repr(experts), remedy=remedy
        )


def _check_experts(experts: Any) -> None:
    """Refuse what is no list of different names, and no weights by name."""
    is_weights = isinstance(experts, Mapping) and all(
        isinstance(name, str) and isinstance(weight, (int, float)) and not isinstance(weight, bool)
        for name, weight in experts.items()
    )
    if not experts or not (is_weights or _are_names(experts)):
        raise RouterError(
            "experts must be a list of different names, or weights by name",
            found=shown(experts),
            remedy="router 'base' uses no expert",
        )
    for name, weight in experts.items() if isinstance(experts, Mapping) else ():
        if not (is_number(weight) and abs(weight) <= MOST_WEIGHT):
            rule = f"the weight of expert '{name}' must be finite, {MOST_WEIGHT:g} at most"
            raise RouterError(rule, found=shown(weight), remedy="larger ones leave what the base's norms can hold")


def _check_signs(setting: Routing) -> None:
    """Refuse negative weights of factors: a weight is on both of them, and twice minus is plus."""
    negative = [name for name, weight in (setting.fixed or {}).items() if weight < 0]
    if negative and setting.mix == "factors":
        raise UsageError(
            "weights of experts whose factors are mixed must not be negative: they would add the update",
            found=f"{negative[0]!r}: {(setting.fixed or {})[negative[0]]!r}",
            remedy="mix='outputs', which takes updates away",
        )


def _are_names(names: Any) -> bool:
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    return is_list and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _check_allow(setting: Routing) -> None:
    _check_names("allow", setting.allow, "leave it out to allow all of them; router 'base' uses none")
    beside = [name for name in setting.fixed or () if setting.allow is not None and name not in setting.allow]
    if beside:
        raise RouterError(
            "named experts must be allowed", found=beside, remedy=f"allow has {list(setting.allow or ())}"
        )


def _check_general(setting: Routing) -> None:
    general = setting.general
    if general.experts is None:
        return
    chosen = [name for name in general.experts if name in (setting.fixed or ()) or name in (setting.allow or ())]
    if chosen:
        raise RouterError("general experts are taken from the others and cannot be chosen themselves", found=chosen)
    if general.mode == "delta" and setting.mix == "factors":
        raise RouterError(
            "mix='factors' needs factors to take away", found="general_mode='delta'", remedy="general_mode='factors'"
        )
    if setting.is_calibrated or setting.options.changes_prototypes:
        raise UsageError(
            "calibrated scores, tie and zeros know experts as they are stored, not without general ones",
            found=f"router={setting.router!r}, general={list(general.experts)}",
            remedy="leave one of them out",
        )


def _check_per(setting: Routing) -> None:
    """Refuse moments of decision that a rule does not have. Fixed weights decide nothing: all are well."""
    rule = None if setting.experts is not None else ROUTERS[setting.router]
    if setting.at is not None and setting.per != "token" and (rule is None or rule.measures != "last"):
        raise UsageError(
            "at names the layer that decides for a token, with per='token', or that router 'logo' looks at",
            found=f"router={setting.router!r}, per={setting.per!r}",
        )
    temperature = setting.choosing.temperature
    if "request" in (setting.per, setting.decides) and isinstance(temperature, Mapping):
        raise UsageError("a decision for a whole request takes one temperature", found=dict(temperature))
    if rule is not None and rule.pers and setting.decides not in rule.pers:
        raise RouterError(f"router '{setting.router}' can decide per {list(rule.pers)}", found=setting.per)


def _check_fallback(setting: Routing) -> None:
    """Refuse a fallback that nothing could fall back on, or that is none."""
    fallback = setting.fallback
    if fallback is None:
        return
    if not isinstance(fallback, str) or not fallback:
        raise UsageError(
            "fallback must be 'uniform', 'chat' or the name of an expert",
            found=shown(fallback),
            remedy="leave it out for none",
        )
    if setting.decides != "request" or setting.choosing.threshold is None:
        raise UsageError(
            "fallback answers requests in which no expert reaches the threshold",
            found=f"router={setting.router!r} decides per {setting.decides}, threshold={setting.choosing.threshold}",
            remedy="per='request' and a threshold, or leave fallback out",
        )
    if fallback not in (UNIFORM, CHAT) and not setting.may_choose(fallback):
        raise RouterError("the expert to fall back on must be allowed", found=fallback)


def _check_options(setting: Routing, rule: Rule) -> None:
    """Refuse options that would mean nothing to a rule."""
    options, router = setting.options, setting.router
    if options.calibrated and (setting.data is None or not setting.data.is_optional):
        able = [name for name, other in ROUTERS.items() if other.data is not None and other.data.is_optional]
        rule_text = f"calibrated scores are for routers by {' or '.join(able)}"
        raise UsageError(rule_text, found=router, remedy=f"router={able[0]!r}")
    if setting.is_calibrated and options.input_norm not in ("none", rule.input_norm):
        raise UsageError(
            f"scores of router '{router}' are read against means of inputs by input_norm='{rule.input_norm}'",
            found=repr(options.input_norm),
            remedy="leave input_norm out",
        )
    by_prototypes = "score_rows" in rule.reads and rule.needs == "weights"
    if options.changes_prototypes and not by_prototypes:
        raise UsageError("tie and zeros are for routers by prototypes", found=router, remedy="router='arrow'")
    if options.features != "hidden" and rule.request is None:
        raise UsageError(
            "features are for routers that look at whole requests", found=router, remedy="router='retrieval'"
        )
    if options.input_norm != "none" and rule.request is not None:
        raise UsageError("input_norm is for routers that look at the inputs of layers", found=router)
