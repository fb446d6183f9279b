"""Settings of an adaptation: the method, and which of the other settings each method looks at."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lorary.build.settings import BuildSettings
from lorary.errors import UsageError
from lorary.flags import check_flags, check_methods, flag

LORA, JOINT, MU, NEAREST, POLY, POLY_Z, CAT, LORAHUB = (
    "lora", "joint", "mu", "nearest", "poly", "poly-z", "cat", "lorahub"
)  # fmt: skip
METHODS = (LORA, JOINT, MU, NEAREST, POLY, POLY_Z, CAT, LORAHUB)
MIXES = ("factors", "outputs")
RETRIEVE = ("loss", "delta", "random")
_STARTS_FROM_SEVERAL = (NEAREST, POLY, POLY_Z, CAT, LORAHUB)
# Where an adapter comes from and goes to: the hashes of its parents say more.
_NOT_RECORDED = ("train", "start_library", "name")


@dataclass(frozen=True)
class AdaptSettings:
    """Everything that decides what an adapted adapter becomes; recorded in its provenance.

    Args:
        method: `lora`, `joint`, `mu`, `nearest`, `poly`, `poly-z`, `cat` or `lorahub`.
        train: how to train. Its rank, alpha and layers are those of `lora` and of the short adapters by which
            `nearest` may compare; a method that starts from adapters keeps theirs.
        rank: rank of the result; a smaller one than the method gives truncates (the error is recorded), a larger one
            leaves room to learn.
        name: name of the result in its library, for one task only; TASK-METHOD by default.
        experts: adapters of the library to use; by default all but those that were adapted from others.
        start: adapter to start from; by default the one called `joint`.
        start_library: folder of the library that holds it; by default the library itself.
        zero_shot: take the start as it is: no step is trained.
        mix: sum `factors` or `outputs`; by default factors for mu and for nearest, where ranks agree.
        sk: use so many adapters, retrieved for each task; by default nearest takes one, and the others all.
        retrieve: by what: `loss` (lowest loss on some training rows), `delta` (largest cosine with a short adapter of
            the task) or `random`.
        retrieve_rows: training rows whose loss is taken.
        weights_learning_rate: peak learning rate of the mixing weights.
        budget: candidates to try, at most.
        l1: what is added to the loss for each unit of the mean absolute weight.
    """

    method: str = flag(LORA, choices=METHODS)
    train: BuildSettings = field(default_factory=BuildSettings)
    rank: int | None = flag(None, above=0)
    name: str | None = None
    experts: tuple[str, ...] | None = flag(None, methods=(MU, *_STARTS_FROM_SEVERAL))
    start: str | None = flag(None, methods=(JOINT,))
    start_library: str | None = flag(None, metavar="LIB3", methods=(JOINT,))
    zero_shot: bool = flag(False, option="", methods=(JOINT, MU, NEAREST))
    mix: str | None = flag(None, choices=MIXES, methods=(MU, NEAREST, LORAHUB))
    sk: int | None = flag(None, above=0, methods=_STARTS_FROM_SEVERAL)
    retrieve: str = flag("loss", choices=RETRIEVE, methods=_STARTS_FROM_SEVERAL)
    retrieve_rows: int = flag(16, above=0, methods=_STARTS_FROM_SEVERAL)
    weights_learning_rate: float = flag(0.1, above=0.0, methods=(POLY, POLY_Z, CAT))
    budget: int = flag(40, above=0, methods=(LORAHUB,))
    l1: float = flag(0.05, least=0.0, methods=(LORAHUB,))

    def __post_init__(self) -> None:
        check_flags(self)
        check_methods(self, self.method, spelled={"zero_shot": "--steps 0"})
        if self.method != NEAREST and self.sk is None and (self.retrieve, self.retrieve_rows) != ("loss", 16):
            raise UsageError("--retrieve and --retrieve-rows need --sk", found="none", remedy="give --sk")

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
    """The settings as values of JSON, except those of the training, which are recorded beside them."""
    values = {key: value for key, value in asdict(settings).items() if key not in _NOT_RECORDED}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
