"""Where experts are trained: whatever the method, units go in, are cut into shards, and come out in the library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorary.build.experts import check_same_build
from lorary.build.jobs import ExpertSpec, num_steps
from lorary.build.settings import RunSettings
from lorary.build.shards import Shard, build_shard, train_shard
from lorary.build.state import build_key, checkpoint_path, close_build, open_shards
from lorary.data.schema import Task
from lorary.data.tasks import BUILTIN
from lorary.data.tokenizer_content import content_of_tokenizer
from lorary.display import Display
from lorary.errors import TrainError
from lorary.formats.base import EMBEDDED
from lorary.library.layout import LOGS
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.train.callbacks import Callback
from lorary.train.executor import Executor, LocalExecutor

# Shards are cut for so many workers where nobody says how many there are: small enough to keep that many busy.
WORKERS = 4


@dataclass(frozen=True)
class BuildContext:
    """What all stages of a build share.

    Args:
        library: where the experts go.
        tasks: the tasks to train on, by name.
        run: how to run.
        display: where progress is shown.
        base: the base model in this process; None where other processes train.
        base_reference: what they load it by; empty where it was given from memory.
        tasks_reference: what they load the tasks by.
        tasks_columns: which columns of these hold what, where that was said.
        executor: runs shards elsewhere; None trains in this process.
        workers: how many shards run at once; None where the executor finds out.
        callbacks: watch the training in this process.
        logs: folder of the metrics; the library's own where None.
    """

    library: Library
    tasks: Mapping[str, Task]
    run: RunSettings
    display: Display
    base: Base | None = None
    base_reference: str = ""
    tasks_reference: str = ""
    executor: Executor | None = None
    workers: int | None = None
    callbacks: Sequence[Callback] = ()
    logs: Path | None = None
    tasks_columns: str | None = None

    @property
    def base_dtype(self) -> str | None:
        """Dtype of the base in this process, as it is recorded; None where other processes train."""
        return None if self.base is None else self.run.precision_of(self.base.model)

    @property
    def requested_dtype(self) -> str:
        """What a build is keyed by: the same wherever it runs, so that another executor goes on where one ended."""
        return self.run.precision if self.base_reference else f"{self.run.dtype} {self.base_dtype}"

    @property
    def log_folder(self) -> Path:
        """Where metrics are written."""
        return self.library.path / LOGS if self.logs is None else self.logs


def train_units(context: BuildContext, units: Sequence[ExpertSpec]) -> tuple[list[str], list[str]]:
    """Train the experts that the library lacks, and commit each as it ends. Run again, it goes on.

    Args:
        context: where.
        units: all experts of this stage.

    Returns:
        Names of those trained by this run, and of those that were there.

    Raises:
        LibraryError: if the library holds an expert of the same name from another build, or another build runs on it.
        TrainError: if the training cannot go on.
    """
    library = context.library
    names = set(library.names())
    kept = [unit for unit in units if unit.name in names]
    # Where other processes train, the experts themselves say on what, and must agree.
    dtype = context.base_dtype or (library.provenance(kept[0].name).get("base_dtype") if kept else None)
    tokenizer = content_of_tokenizer(context.base.tokenizer) if kept and context.base is not None else None
    check_same_build(library, kept, context.tasks, dtype, tokenizer)
    if kept:
        context.display.say(f"{len(kept)} of {len(units)} experts are in the library already")
    _train_pending(context, units, dtype)
    return [unit.name for unit in units if unit.name not in names], [unit.name for unit in kept]


def _train_pending(context: BuildContext, units: Sequence[ExpertSpec], dtype: str | None) -> None:
    path = context.library.path
    key = build_key(units, context.tasks, context.run.window, context.requested_dtype)
    # Long ones first, so that no single one is left running at the end.
    order = sorted(units, key=lambda unit: (-num_steps(unit, context.tasks), unit.name))
    by_name = {unit.name: unit for unit in units}
    for _ in range(2):  # twice, since somebody may remove experts that an interrupted build had finished
        if pending := _missing(context.library, order):
            shards = open_shards(path, key, pending, _num_shards(len(pending), context))
            _run(
                context, [_shard(context, [by_name[n] for n in names], key, i, dtype) for i, names in enumerate(shards)]
            )
        close_build(path, key)
    if missing := _missing(context.library, order):
        raise TrainError("every expert must be in the library once its shard has ended", found=f"without {missing[:5]}",
                         remedy="run the same command again")  # fmt: skip


def _missing(library: Library, units: Sequence[ExpertSpec]) -> list[str]:
    names = set(library.names())
    return [unit.name for unit in units if unit.name not in names]


def _num_shards(num_pending: int, context: BuildContext) -> int:
    """In this process one queue of them all; elsewhere enough for every worker, and a window at most in each."""
    if context.executor is None:
        return 1
    size = min(context.run.window, -(-num_pending // (context.workers or WORKERS)))
    return -(-num_pending // size)


def _shard(context: BuildContext, units: Sequence[ExpertSpec], key: str, number: int, dtype: str | None) -> Shard:
    path = context.library.path
    return Shard(
        units=tuple(units),
        library=str(path.resolve()),
        checkpoint=str(checkpoint_path(path, key, [unit.name for unit in units]).resolve()),
        logs=str(context.log_folder.resolve()),
        log="train" if context.executor is None else f"train-{number}",
        base=_absolute(context.base_reference),
        base_dtype=dtype,
        tasks=_absolute(context.tasks_reference),
        columns=context.tasks_columns,
        data={name: context.tasks[name].data_hash for unit in units for name in unit.tasks},
        run=context.run,
    )


def _absolute(reference: str) -> str:
    """A path that other processes understand; what is no path (a name, an id) stays."""
    is_word = reference in ("", BUILTIN, EMBEDDED)  # also where a folder is called so
    return reference if is_word or not Path(reference).exists() else str(Path(reference).resolve())


def _run(context: BuildContext, shards: Sequence[Shard]) -> None:
    if context.executor is not None:
        context.executor.run(build_shard, shards)
        return
    base = context.base
    assert base is not None

    def train_here(shard: Shard) -> None:
        train_shard(shard, base, context.library, context.tasks, context.display, context.callbacks)

    LocalExecutor().run(train_here, shards)
