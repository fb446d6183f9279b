"""Settings of an adaptation: the method, and which of the other settings each method looks at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lorary.build.settings import BuildSettings, option
from lorary.errors import UsageError
from lorary.numbers import check_count, check_number

LORA, JOINT, MU, NEAREST, POLY, POLY_Z, CAT, LORAHUB = (
    "lora", "joint", "mu", "nearest", "poly", "poly-z", "cat", "lorahub"
)  # fmt: skip
METHODS = (LORA, JOINT, MU, NEAREST, POLY, POLY_Z, CAT, LORAHUB)
MIXES = ("factors", "outputs")
RETRIEVE = ("loss", "delta", "random")
# Which methods look at a setting; what is not listed is looked at by all. The first of several is what is shown.
BELONGS: Mapping[str, Sequence[str]] = {
    "experts": (MU, NEAREST, POLY, POLY_Z, CAT, LORAHUB),
    "start": (JOINT,),
    "start_library": (JOINT,),
    "zero_shot": (JOINT, MU, NEAREST),
    "mix": (MU, NEAREST, LORAHUB),
    "sk": (NEAREST, POLY, POLY_Z, CAT, LORAHUB),
    "retrieve": (NEAREST, POLY, POLY_Z, CAT, LORAHUB),
    "retrieve_rows": (NEAREST, POLY, POLY_Z, CAT, LORAHUB),
    "weights_learning_rate": (POLY, POLY_Z, CAT),
    "budget": (LORAHUB,),
    "l1": (LORAHUB,),
}
# Where an adapter comes from and goes to: the hashes of its parents say more.
_NOT_RECORDED = ("train", "start_library", "name")


@dataclass(frozen=True)
class AdaptSettings:
    """Everything that decides what an adapted adapter becomes; recorded in its provenance.

    Args:
        method: one of `METHODS`.
        train: how to train. Its rank, alpha and layers are those of `lora` and of the short adapters by which
            `nearest` may compare; a method that starts from adapters keeps theirs.
        rank: of the result. Where None, `lora` takes that of `train`, other methods what they give by themselves; a
            smaller one truncates (the error is recorded), a larger one leaves room to learn.
        name: of the result in its library; `TASK-METHOD` where None. For one task only.
        experts: the adapters of the library to use; where None all but those that were adapted from others.
        start: for joint, the adapter to start from; where None the one called `joint`.
        start_library: for joint, folder of the library that holds it; where None the library itself.
        zero_shot: take the start as it is: no step is trained.
        mix: `factors` or `outputs`; where None the method's own way: µ and nearest sum factors where ranks agree.
        sk: use so many adapters, retrieved for each task; where None nearest takes one, and the others all.
        retrieve: by what: `loss` (lowest loss on some training rows), `delta` (largest cosine with a short adapter of
            the task) or `random`.
        retrieve_rows: training rows whose loss is taken.
        weights_learning_rate: peak learning rate of mixing weights.
        budget: candidates that lorahub tries, at most.
        l1: what lorahub adds to the loss for each unit of the mean absolute weight.
    """

    method: str = LORA
    train: BuildSettings = field(default_factory=BuildSettings)
    rank: int | None = None
    name: str | None = None
    experts: tuple[str, ...] | None = None
    start: str | None = None
    start_library: str | None = None
    zero_shot: bool = False
    mix: str | None = None
    sk: int | None = None
    retrieve: str = "loss"
    retrieve_rows: int = 16
    weights_learning_rate: float = 0.1
    budget: int = 40
    l1: float = 0.05

    def __post_init__(self) -> None:
        for key, words in (("method", METHODS), ("mix", (None, *MIXES)), ("retrieve", RETRIEVE)):
            if getattr(self, key) not in words:
                known = ", ".join(word for word in words if word)
                raise UsageError(f"--{key} must be one of {known}", found=getattr(self, key))
        for key in ("rank", "sk", "retrieve_rows", "budget"):
            if getattr(self, key) is not None:
                check_count(option(key), getattr(self, key), above=0)
        check_number("--weights-learning-rate", self.weights_learning_rate, above=0.0)
        check_number("--l1", self.l1, least=0.0)
        self._refuse_foreign()
        if self.method != NEAREST and self.sk is None and (self.retrieve, self.retrieve_rows) != ("loss", 16):
            raise UsageError("--retrieve and --retrieve-rows need --sk", found="none", remedy="give --sk")

    def _refuse_foreign(self) -> None:
        default = {key: field.default for key, field in self.__dataclass_fields__.items()}
        for key, owners in BELONGS.items():
            if self.method not in owners and getattr(self, key) != default[key]:
                option = "--steps 0" if key == "zero_shot" else f"--{key.replace('_', '-')}"
                raise UsageError(
                    f"{option} needs --method {' or '.join(owners)}",
                    found=f"--method {self.method}",
                    remedy="leave it out",
                )

    def name_for(self, task: str) -> str:
        """Name of the result for a task."""
        return f"{task}-{self.method}" if self.name is None else self.name


def adapt_settings(method: str, train: BuildSettings, **changes: Any) -> AdaptSettings:
    """The settings of a method; a change of None keeps the default.

    Args:
        method: one of `METHODS`.
        train: how to train.
        changes: other fields of `AdaptSettings`.

    Raises:
        UsageError: if a value is out of range, or belongs to another method.
    """
    return AdaptSettings(method, train, **{key: value for key, value in changes.items() if value is not None})


def recorded_adaptation(settings: AdaptSettings) -> dict[str, Any]:
    """The settings as values of JSON, but for those of the training, which are recorded beside them."""
    known = {key: value for key, value in asdict(settings).items() if key not in _NOT_RECORDED}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
