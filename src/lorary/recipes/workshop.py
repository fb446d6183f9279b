"""Where experts are trained: whatever the method, units go in, are cut into shards, and come out in the library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lorary.data.tasks import Task, load_tasks
from lorary.data.template import Template, make_template
from lorary.errors import TrainError
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.recipes.build_settings import BuildSettings, RunSettings
from lorary.recipes.display import Display
from lorary.recipes.experts import check_same_build, provenance_of, targets_of, to_adapter
from lorary.recipes.jobs import Unit, make_job, num_steps
from lorary.recipes.ledger import build_key, checkpoint_path, close_build, open_shards
from lorary.recipes.watch import TrainingBar, open_logs
from lorary.train.callbacks import Callback
from lorary.train.executor import Executor, LocalExecutor
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import LoopSettings, TrainedUnit

LOGS = "logs"
# Shards are cut for so many workers where nobody says how many there are: small enough to keep that many busy.
WORKERS = 4


@dataclass(frozen=True)
class Shard:
    """Experts that one process trains: plain data, so that it can be sent to another machine.

    Args:
        units: the experts, in the order in which they take their places; some may be finished already.
        library: folder of the library, which is the ledger.
        checkpoint: file in which the state of the training is kept.
        log: name of the metrics in the library's folder of logs.
        base: reference of the base model.
        tasks: reference of the tasks.
        run: how to run.
    """

    units: tuple[Unit, ...]
    library: str
    checkpoint: str
    log: str
    base: str
    tasks: str
    run: RunSettings

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(unit.name for unit in self.units)


@dataclass(frozen=True)
class Workshop:
    """What all stages of a build share.

    Args:
        library: where the experts go.
        tasks: the tasks to train on, by name.
        run: how to run.
        display: where progress is shown.
        base: the base model in this process; None where other processes train.
        base_reference: what they load it by.
        tasks_reference: what they load the tasks by.
        executor: runs shards elsewhere; None trains in this process.
        workers: how many shards run at once; None where the executor finds out.
        callbacks: watch the training in this process.
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


def train_units(shop: Workshop, units: Sequence[Unit]) -> tuple[list[str], list[str]]:
    """Train the experts that the library lacks, and commit each as it ends. Run again, it goes on.

    Args:
        shop: where.
        units: all experts of this stage.

    Returns:
        Names of those trained by this run, and of those that were there.

    Raises:
        LibraryError: if the library holds an expert of the same name from another build, or another build runs on it.
        TrainError: if the training cannot go on.
    """
    library = shop.library
    kept = [unit for unit in units if unit.name in library]
    dtype = None if shop.base is None else str(shop.base.model.dtype)
    check_same_build(library, kept, shop.tasks, dtype)
    if kept:
        shop.display.say(f"{len(kept)} of {len(units)} experts are in the library already")
    _train_pending(shop, units, dtype or shop.run.dtype)
    there = {unit.name for unit in kept}
    return [unit.name for unit in units if unit.name not in there], [unit.name for unit in kept]


def _train_pending(shop: Workshop, units: Sequence[Unit], dtype: str) -> None:
    key = build_key(units, shop.tasks, shop.run.window, dtype)
    # Long ones first, so that no single one is left running at the end.
    order = sorted(units, key=lambda unit: (-num_steps(unit, shop.tasks), unit.name))
    for _ in range(2):  # twice, since somebody may remove experts that an interrupted build had finished
        pending = [unit.name for unit in order if unit.name not in shop.library]
        if not pending:
            break
        shards = open_shards(shop.library.path, key, pending, _num_shards(len(pending), shop))
        by_name = {unit.name: unit for unit in units}
        _run(shop, [_shard(shop, [by_name[n] for n in names], key, i) for i, names in enumerate(shards)])
        close_build(shop.library.path)
    close_build(shop.library.path)  # also what builds left that were given up
    if missing := [unit.name for unit in units if unit.name not in shop.library]:
        raise TrainError("every expert must be in the library once its shard has ended", found=f"without {missing[:5]}",
                         remedy="run the same command again")  # fmt: skip


def _num_shards(num_pending: int, shop: Workshop) -> int:
    """In this process one queue of them all; elsewhere enough for every worker, and a window at most in each."""
    if shop.executor is None:
        return 1
    size = min(shop.run.window, -(-num_pending // (shop.workers or WORKERS)))
    return -(-num_pending // size)


def _shard(shop: Workshop, units: Sequence[Unit], key: str, number: int) -> Shard:
    path = shop.library.path
    return Shard(
        units=tuple(units),
        library=str(path.resolve()),
        checkpoint=str(checkpoint_path(path, key, [unit.name for unit in units]).resolve()),
        log="train" if shop.executor is None else f"train-{number}",
        base=_absolute(shop.base_reference),
        tasks=_absolute(shop.tasks_reference),
        run=shop.run,
    )


def _absolute(reference: str) -> str:
    """A path that other processes understand; what is no path (a name, an id) stays."""
    return str(Path(reference).resolve()) if reference and Path(reference).exists() else reference


def _run(shop: Workshop, shards: Sequence[Shard]) -> None:
    if shop.executor is not None:
        shop.executor.run(build_shard, shards)
        return
    base = shop.base
    assert base is not None

    def train_here(shard: Shard) -> None:
        train_shard(shard, base, shop.library, shop.tasks, shop.display, shop.callbacks)

    LocalExecutor().run(train_here, shards)


def build_shard(shard: Shard) -> None:
    """Train the experts of a shard in this process and commit them to their library: the work of an executor.

    Base and tasks stay loaded for the next shard. The coordinating process holds the library's build lock.

    Raises:
        LoraryError: as `train_shard`; also if base, tasks or library cannot be read here.
    """
    base = _resident_base(shard.base, shard.run.dtype, shard.run.device)
    library = Library.open(shard.library)
    library.check_base(base.model)
    names = tuple(sorted({name for unit in shard.units for name in unit.tasks}))
    train_shard(shard, base, library, _resident_tasks(shard.tasks, names), Display())


@lru_cache(maxsize=1)
def _resident_base(reference: str, dtype: str, device: str) -> Base:
    return load_base(reference, dtype=dtype, device=device)


@lru_cache(maxsize=4)
def _resident_tasks(reference: str, names: tuple[str, ...]) -> dict[str, Task]:
    return load_tasks(reference, names=names)


def train_shard(
    shard: Shard,
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    display: Display,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train the experts of a shard with everything at hand, committing each as it ends.

    Args:
        shard: what to train.
        base: the frozen base model.
        library: the ledger.
        tasks: by name.
        display: where progress is shown.
        callbacks: watch the training.

    Raises:
        TrainError: if a loss is not finite, or a checkpoint cannot be written.
        LibraryError: if the library cannot be written.
    """
    settings = shard.units[0].settings
    targets = {unit.name: targets_of(base, unit.settings) for unit in shard.units}
    shapes = {path: shape for own in targets.values() for path, shape in own.items()}
    template = template_for(base, settings)
    jobs = [make_job(unit, tasks, template, frozenset(targets[unit.name])) for unit in shard.units]
    by_name = {unit.name: unit for unit in shard.units}

    def commit(trained: TrainedUnit) -> None:
        unit = by_name[trained.name]
        if unit.name not in library:  # a run that was killed may have committed it just before
            adapter = to_adapter(unit, trained.adapters[unit.name], base)
            library.add_adapter(adapter, provenance_of(unit, trained, tasks, base))

    with display.bar(f"training {len(jobs)} experts", sum(job.num_steps for job in jobs)) as bar:
        watch = TrainingBar(bar, {job.name: job.num_steps for job in jobs}, library.names())
        logs = open_logs(shard.run.logs, library.path / LOGS, shard.log)
        train_queue(
            base.model,
            jobs,
            expert_stack(base.model, shapes, jobs, shard.run.window),
            loop_settings(settings, shard.run),
            checkpoint=Path(shard.checkpoint),
            on_finish=commit,
            callbacks=[watch, *logs, *callbacks],
        )


def template_for(base: Base, settings: BuildSettings) -> Template:
    """What turns the rows of a build into tokens."""
    return make_template(settings.template, base.tokenizer, max_length=base.most_tokens(settings.max_length))


def loop_settings(settings: BuildSettings, run: RunSettings) -> LoopSettings:
    """What the training loop is told, from the settings of a build and of its run."""
    optimiser = OptimiserSettings(
        settings.learning_rate, warmup=settings.warmup, clip=settings.clip, weight_decay=settings.weight_decay
    )
    return LoopSettings(
        optimiser,
        batch_size=settings.batch_size,
        dropout=settings.dropout,
        num_evals=settings.evals,
        patience=settings.patience,
        seed=settings.seed,
        init=settings.init,
        init_scale=settings.init_scale,
        max_tokens=run.max_tokens,
        save_every_s=run.save_every_s,
        activation_checkpointing=run.activation_checkpointing,
    )
