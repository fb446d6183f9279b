"""What a study is: tasks, a list of stages in the order in which they are worth having, and questions to answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lorary.adapt.settings import JOINT, AdaptSettings, adapt_settings
from lorary.build.methods import MethodSettings
from lorary.build.settings import BuildSettings, RunSettings
from lorary.errors import UsageError
from lorary.evaluate.settings import EvaluateSettings
from lorary.study.question import Question
from lorary.study.values import mapping_for, validated

SUBSET = "subset"
SPLITS = ("held_in", "held_out")
# A column: library, router and split.
Run = tuple[str, str, str]


@dataclass(frozen=True)
class TaskSet:
    """Tasks by reference.

    Args:
        name: what the report calls them; held-out sets with a name are reported apart, beside all of them together.
        reference: as `lorary.data.tasks.load_tasks` takes it; None where `--tasks` must name it.
        names: the tasks to take, in the order in which `tasks: N` of a library counts them.
        assume: for a dry run without the data: `tasks`, `rows` (of each split; `train_rows` and so on for one of them)
            and `tokens` (of a row).
    """

    name: str | None = None
    reference: str | None = None
    names: tuple[str, ...] | None = None
    assume: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildStage:
    """One library.

    Args:
        name: of the library, and of its folder.
        settings: how its experts are trained.
        method: how tasks are assigned to experts; `private` for a subset.
        tasks: the first so many training tasks of the study, or these by name; all where None.
        private: for mbc, the library of the study whose adapters are clustered.
        of: the library of the study that this one takes its experts from, untrained, byte for byte.
        data: another reference for its tasks, to see what changed data do.
    """

    kind: ClassVar[str] = "build"
    name: str
    settings: BuildSettings
    method: MethodSettings
    tasks: int | tuple[str, ...] | None = None
    private: str | None = None
    of: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        if self.tasks == ():
            raise UsageError(f"build:{self.name} must have tasks", found="tasks []")

    @property
    def needs(self) -> tuple[str, ...]:
        """Identities of the stages whose results it reads."""
        return tuple(f"build:{name}" for name in (self.private, self.of) if name is not None)


@dataclass(frozen=True)
class EvaluateStage:
    """Libraries by routers, on test rows of held-in and held-out tasks.

    Args:
        name: of the stage.
        libraries: of the study.
        routers: as `lorary.route.spec` reads them; kept the one way to write them.
        held_in: test rows of each task that the library was trained on; none where 0.
        held_out: test rows of each held-out task; none where 0.
        settings: further fields of `EvaluateSettings`.
    """

    kind: ClassVar[str] = "evaluate"
    name: str
    libraries: tuple[str, ...]
    routers: tuple[str, ...]
    held_in: int = 0
    held_out: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "routers", EvaluateSettings(routers=self.routers, **self.settings).routers)
        if min(self.held_in, self.held_out) < 0 or not (self.held_in or self.held_out):
            raise UsageError(
                f"evaluate:{self.name} must score rows", found=f"held_in {self.held_in}, held_out {self.held_out}"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        """Identities of the stages whose results it reads."""
        return tuple(f"build:{name}" for name in self.libraries)

    def runs(self) -> list[Run]:
        """(library, router, split) of everything there is to score, the most telling first."""
        splits = [split for split in SPLITS if getattr(self, split)]
        return [(library, router, split) for router in self.routers for library in self.libraries for split in splits]


@dataclass(frozen=True)
class AdaptStage:
    """New tasks learnt from a few rows, with a library's help and without.

    Args:
        name: of the stage.
        library: of the study, to adapt from.
        methods: as `lorary.adapt.settings.AdaptSettings` takes them.
        train: how adapters are trained.
        joint: library of the study whose joint expert the method `joint` starts from.
        tasks: held-out tasks; all of them that have training rows where None.
        held_out: test rows of each task.
        settings: further fields of `AdaptSettings`, by method.
        evaluate: further fields of `EvaluateSettings`.
    """

    kind: ClassVar[str] = "adapt"
    name: str
    library: str
    methods: tuple[str, ...]
    train: BuildSettings
    joint: str | None = None
    tasks: tuple[str, ...] | None = None
    held_out: int = 50
    settings: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.held_out < 1:
            raise UsageError(f"adapt:{self.name} must score rows", found=f"held_out {self.held_out}")
        EvaluateSettings(**self.evaluate)
        if idle := [method for method in self.settings if method not in self.methods]:
            raise UsageError(f"settings of adapt:{self.name} must be by its methods", found=idle[0])
        for method in self.methods:
            self.method_settings(method)

    def method_settings(self, method: str, joint_library: str | None = None) -> AdaptSettings:
        """The settings of one of its methods.

        Args:
            method: which.
            joint_library: folder of the library whose joint expert the method `joint` starts from.

        Raises:
            UsageError: if a value is out of range, or belongs to another method.
        """
        kind, where = (
            mapping_for(AdaptSettings, ("method", "train", "name")),
            f"settings of adapt:{self.name} for {method}",
        )
        fields = validated(kind, self.settings.get(method, {}), where)
        if method == JOINT and joint_library is not None:
            fields["start_library"] = joint_library
        return adapt_settings(method, self.train, **fields)

    @property
    def needs(self) -> tuple[str, ...]:
        """Identities of the stages whose results it reads."""
        return tuple(f"build:{name}" for name in (self.library, self.joint) if name is not None)

    def runs(self) -> list[Run]:
        """A column of each method; its library is the stage, its router the method."""
        return [(self.name, method, "held_out") for method in self.methods]


@dataclass(frozen=True)
class DriftStage:
    """How far another seed, or other data, move prototypes and clusters.

    Args:
        name: of the stage.
        library: of the study.
        against: another one, of experts by the same names.
        k: clusters to compare; none where 0.
        seed: of the clustering.
    """

    kind: ClassVar[str] = "drift"
    name: str
    library: str
    against: str
    k: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        if self.k < 0 or not 0 <= self.seed < 2**32:
            raise UsageError(f"drift:{self.name} must have k and seed of at least 0, seed below 2^32",
                             found=f"k {self.k}, seed {self.seed}")  # fmt: skip

    @property
    def needs(self) -> tuple[str, ...]:
        """Identities of the stages whose results it reads."""
        return (f"build:{self.library}", f"build:{self.against}")


Stage = BuildStage | EvaluateStage | AdaptStage | DriftStage


def split_name(split: str) -> str:
    """A split as readers see it: `held-in`, `held-out`, `held-out: SET`."""
    return split.replace("_", "-", 1)


def identity(stage: Stage) -> str:
    """What a stage is called: `build:private`."""
    return f"{stage.kind}:{stage.name}"


@dataclass(frozen=True)
class Study:
    """A configuration file, read.

    Args:
        name: of the file.
        source: what it was read by: a name, or a file.
        about: what it is for, in words.
        base: the base model.
        train: tasks to train on.
        held_out: tasks that nothing is trained on, from one place or several.
        stages: in order.
        questions: answered in the report.
        run: how builds are run.
        assume: for a dry run without the base: `model` (fields of its configuration, `model_type` among them),
            `dtype_bytes`, `tflops` (of the device, as far as training reaches it).
    """

    name: str
    source: str
    about: str
    base: str
    train: TaskSet
    held_out: tuple[TaskSet, ...]
    stages: tuple[Stage, ...]
    questions: tuple[Question, ...] = ()
    run: RunSettings = field(default_factory=RunSettings)
    assume: Mapping[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        """A stage by its identity."""
        return next(stage for stage in self.stages if identity(stage) == name)
