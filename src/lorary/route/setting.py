"""The settings of one router: which rule, what becomes of its scores, when it decides, how experts are mixed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from lorary.errors import RouterError, UsageError, did_you_mean
from lorary.lora.targets import layer_number
from lorary.numbers import MOST_COUNT, is_number, shown
from lorary.ops.choose import Choice, Scale
from lorary.ops.mix import Mix
from lorary.ops.normalise import InputNorm
from lorary.route import ROUTERS
from lorary.route.general_subtraction import GeneralMode
from lorary.route.rule import Decides, Features, Per, Rule

_WORDS: Mapping[str, tuple[str | None, ...]] = {
    "input_norm": get_args(InputNorm),
    "per": (None, *get_args(Per)),
    "tie": ("none", "concat"),
    "zeros": ("skip", "keep"),
    "features": get_args(Features),
    "general_mode": get_args(GeneralMode),
}
# Larger ones are slips: their squares, which the base's norms take, leave what float32 holds, and no number shows it.
MOST_WEIGHT = 1e6
# The fields there were from the start: they are always written.
_FIRST_FIELDS = ("router", "top_k", "temperature", "mix", "experts")


@dataclass(frozen=True)
class Routing:
    """Settings of one router.

    Args:
        router: a name in `lorary.route.ROUTERS`; ignored where `experts` names them.
        top_k: experts per token and layer, at least 1, clamped to the number there is.
        temperature: divides the scores, above 0; or one for each layer, by the path of a routed layer or the number
            of a transformer layer (a path wins), 1 for those not named.
        mix: `outputs` (the weighted sum of the experts' updates) or `factors` (the product of weighted factors).
        experts: experts with a fixed weight each; given names alone, they share the weight 1.
        top_p: see `lorary.ops.choose.Choice`, as for `threshold`, `scale` and `null`.
        threshold: as above.
        scale: as above; the rule's own where None.
        null: as above.
        input_norm: what is done to hidden states before scoring, and for scoring alone: `none`, `unit` or `layer`.
        per: when it decides. `layer`: each token in each layer. `token`: each token once, at one layer, for all later
            ones. `request`: each row once, from a pass of the bare base over its prompt, for all layers and tokens.
            None: as the rule does by itself.
        at: with per='token', the path of the layer that decides; the routed one that runs first where None. For logo,
            that of the layer it looks at; the query projection of the last routed block where None.
        allow: the experts that may be used at all; all where None.
        candidates: for routers of two stages, how many experts pass the first, clamped to the number there is.
        calibrated: score by how unusual a norm is for its expert; needs prepared means and deviations.
        tie: `concat`: q, k and v of one attention share a prototype, that of their stacked updates.
        zeros: `skip`: an expert whose update is zero is never chosen. `keep`: it is known by its lora_a.
        features: what a router for whole requests reads of a prompt. `hidden`: the mean of the base's last hidden
            states. `text`: the vector of a sentence encoder, for which the text is made from the tokens.
        general: experts that stand for what all have in common: they are never chosen, and each other one acts and is
            scored without the mean of them.
        general_mode: `delta`: the mean of their updates is taken away. `factors`: the means of their factors are.

    Raises:
        RouterError: if there is no such router or mix, or the router cannot do what is asked.
        UsageError: if a value is out of range or makes no sense beside another.
    """

    router: str = "arrow"
    top_k: int = 4
    temperature: float | Mapping[Any, float] = 1.0
    mix: Mix = "outputs"
    experts: Mapping[str, float] | Sequence[str] | None = None
    top_p: float | None = None
    threshold: float | None = None
    scale: Scale | None = None
    null: float | None = None
    input_norm: InputNorm = "none"
    per: Per | None = None
    at: str | None = None
    allow: Sequence[str] | None = None
    candidates: int = 20
    calibrated: bool = False
    tie: str = "none"
    zeros: str = "skip"
    features: Features = "hidden"
    general: Sequence[str] | None = None
    general_mode: GeneralMode = "delta"

    def __post_init__(self) -> None:
        if self.experts is None and (not isinstance(self.router, str) or self.router not in ROUTERS):
            raise RouterError(
                "a router must exist",
                found=self.router if isinstance(self.router, str) else shown(self.router),
                remedy=did_you_mean(str(self.router), ROUTERS, remedy=f"one of {list(ROUTERS)}, or experts=[...]"),
            )
        by_layer = self.temperature if isinstance(self.temperature, Mapping) else {"": self.temperature}
        for temperature in by_layer.values():
            self._choice(temperature)
        if self.mix not in get_args(Mix):
            raise RouterError(f"mix must be one of {list(get_args(Mix))}", found=self.mix)
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise UsageError(f"{name} must be one of {list(words)}", found=repr(getattr(self, name)))
        if type(self.calibrated) is not bool:
            raise UsageError("calibrated must be true or false", found=repr(self.calibrated))
        if type(self.candidates) is not int or not 1 <= self.candidates <= MOST_COUNT:
            raise UsageError("candidates must be a whole number of at least 1", found=shown(self.candidates))
        if self.experts is not None:
            _check_experts(self.experts)
            _check_signs(self)
        _check_allow(self)
        _check_general(self)
        _check_per(self)

    @property
    def fixed(self) -> dict[str, float] | None:
        """Weight by expert where experts are named, else None."""
        if self.experts is None or isinstance(self.experts, Mapping):
            return None if self.experts is None else dict(self.experts)
        return {name: 1.0 / len(self.experts) for name in self.experts}

    def may_choose(self, expert: str) -> bool:
        """Whether an expert may get a weight."""
        return (self.allow is None or expert in self.allow) and expert not in (self.general or ())

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
        return self.calibrated or (self._rule is not None and self._rule.calibrated)

    @property
    def _rule(self) -> Rule | None:
        return None if self.experts is not None else ROUTERS.get(self.router)

    def choice(self, path: str) -> Choice:
        """How scores become weights in one layer.

        Args:
            path: of a routed layer; the empty string asks for no layer in particular.
        """
        if not isinstance(self.temperature, Mapping):
            return self._choice(self.temperature)
        by_key = {str(key): value for key, value in self.temperature.items()}
        return self._choice(by_key.get(path, by_key.get(str(layer_number(path)), 1.0)))

    def _choice(self, temperature: float) -> Choice:
        own: Scale = "softmax" if self._rule is None else self._rule.scale
        scale = own if self.scale is None else self.scale
        return Choice(self.top_k, self.top_p, self.threshold, temperature, scale, self.null)

    def to_json(self) -> dict[str, Any]:
        """The settings as values of JSON: the first five fields, and those others that differ from their defaults."""
        default, known = Routing(), asdict(self)
        if isinstance(self.temperature, Mapping):
            known["temperature"] = {str(key): value for key, value in self.temperature.items()}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in known.items()
            if key in _FIRST_FIELDS or value != getattr(default, key)
        }


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
    if setting.allow is None:
        return
    if not setting.allow or not _are_names(setting.allow):
        raise UsageError(
            "allow must be a list of different experts, at least one",
            found=repr(setting.allow),
            remedy="leave it out to allow all of them; router 'base' uses none",
        )
    beside = [name for name in setting.fixed or () if name not in setting.allow]
    if beside:
        raise RouterError("named experts must be allowed", found=beside, remedy=f"allow has {list(setting.allow)}")


def _check_general(setting: Routing) -> None:
    if setting.general is None:
        return
    if not setting.general or not _are_names(setting.general):
        raise UsageError(
            "general must be a list of different experts, at least one",
            found=repr(setting.general),
            remedy="leave it out to take nothing away",
        )
    chosen = [name for name in setting.general if name in (setting.fixed or ()) or name in (setting.allow or ())]
    if chosen:
        raise RouterError("general experts are taken from the others and cannot be chosen themselves", found=chosen)
    if setting.general_mode == "delta" and setting.mix == "factors":
        raise RouterError(
            "mix='factors' needs factors to take away", found="general_mode='delta'", remedy="general_mode='factors'"
        )
    if setting.is_calibrated or (setting.tie, setting.zeros) != ("none", "skip"):
        raise UsageError(
            "calibrated, contrast, tie and zeros know experts as they are stored, not without general ones"
        )


def _check_per(setting: Routing) -> None:
    """Refuse what a rule cannot do, and fields that would mean nothing. Fixed weights decide nothing: all are well."""
    rule = None if setting.experts is not None else ROUTERS[setting.router]
    if setting.at is not None and setting.per != "token" and (rule is None or rule.measures != "last"):
        raise UsageError(
            "at names the layer that decides for a token, with per='token', or that router 'logo' looks at",
            found=f"router={setting.router!r}, per={setting.per!r}",
        )
    if "request" in (setting.per, setting.decides) and isinstance(setting.temperature, Mapping):
        raise UsageError("a decision for a whole request takes one temperature", found=dict(setting.temperature))
    if rule is None:
        return
    if rule.pers and setting.decides not in rule.pers:
        raise RouterError(f"router '{setting.router}' can decide per {list(rule.pers)}", found=setting.per)
    if setting.calibrated and setting.router != "norm":
        raise UsageError("calibrated scores are for routers by norm", found=setting.router, remedy="router='norm'")
    if setting.is_calibrated and setting.input_norm not in ("none", rule.input_norm):
        raise UsageError(
            f"scores of router '{setting.router}' are read against means of inputs by input_norm='{rule.input_norm}'",
            found=repr(setting.input_norm),
            remedy="leave input_norm out",
        )
    by_prototypes = "rows" in rule.reads and rule.needs == "weights"
    if (setting.tie, setting.zeros) != ("none", "skip") and not by_prototypes:
        raise UsageError("tie and zeros are for routers by prototypes", found=setting.router, remedy="router='arrow'")
    if setting.features != "hidden" and rule.request is None:
        raise UsageError(
            "features are for routers that look at whole requests", found=setting.router, remedy="router='retrieval'"
        )
    if setting.input_norm != "none" and rule.request is not None:
        raise UsageError("input_norm is for routers that look at the inputs of layers", found=setting.router)
