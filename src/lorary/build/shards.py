"""One shard of a build: what travels to the process that trains it, and what it does there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from lorary.build.experts import provenance_of, targets_of, to_adapter
from lorary.build.jobs import ExpertSpec, make_job
from lorary.build.progress import TrainingBar, opened_logs
from lorary.build.settings import AUTOCAST, BuildSettings, RunSettings
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.data.template import Template, make_template
from lorary.data.tokenizer_content import content_of_tokenizer
from lorary.display import Display
from lorary.errors import BaseModelError, TaskError
from lorary.library.store import Library
from lorary.model.base import Base, load_base
from lorary.train.callbacks import Callback
from lorary.train.loop import train_queue
from lorary.train.optimiser import OptimiserSettings
from lorary.train.stack import expert_stack
from lorary.train.units import LoopSettings, TrainedUnit


@dataclass(frozen=True)
class Shard:
    """Experts that one process trains: plain data, so that it can be sent to another machine.

    Args:
        units: the experts, in the order in which they take their places; some may be finished already.
        library: folder of the library, which records what is done.
        checkpoint: file in which the state of the training is kept.
        logs: folder of the metrics.
        log: name of the metrics in there.
        base: reference of the base model.
        base_dtype: of the base that experts of this build were trained on before; None where there are none yet.
        tasks: reference of the tasks.
        columns: which of their columns hold what, as `lorary.data.tasks.load_tasks` takes it.
        data: hash of each task's rows as the coordinating process has read them.
        run: how to run.
    """

    units: tuple[ExpertSpec, ...]
    library: str
    checkpoint: str
    logs: str
    log: str
    base: str
    base_dtype: str | None
    tasks: str
    columns: str | None
    data: Mapping[str, str]
    run: RunSettings

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(unit.name for unit in self.units)

    def on(self, device: str) -> "Shard":
        """The same shard, for a process with a device of its own."""
        return replace(self, run=replace(self.run, device=device))


def build_shard(shard: Shard) -> None:
    """Train the experts of a shard in this process and commit them to their library: the work of an executor.

    Base and tasks stay loaded for the next shard. The coordinating process holds the library's build lock.

    Raises:
        TaskError: if the tasks have other rows here than where the build was planned.
        BaseModelError: if the base is not the library's, or has another dtype here than for experts trained before.
        LoraryError: as `train_shard`; also if base, tasks or library cannot be read here.
    """
    tasks = _resident_tasks(shard.tasks, tuple(sorted(shard.data)), shard.columns)
    _check_data(shard, tasks)
    base = _resident_base(shard.base, shard.run.dtype, shard.run.device)
    precision = shard.run.precision_of(base.model)
    if shard.base_dtype not in (None, precision):
        before = str(shard.base_dtype)
        switch = " --autocast" if before.endswith(AUTOCAST) else ""
        raise BaseModelError(
            "all experts of a build must be trained on a base of one dtype",
            found=f"{precision} on {base.model.device} here, {before} before",
            remedy=f"--dtype {before.removeprefix('torch.').removesuffix(AUTOCAST)}{switch}",
        )
    library = Library.open(shard.library)
    library.check_base(base.model)
    train_shard(shard, base, library, tasks, Display())


def _checkpoint(shard: Shard, base: Base) -> Path:
    """The file of the training's state: one that was made of other tokens is not gone on with."""
    path = Path(shard.checkpoint)
    return path.with_name(f"{path.stem}-{content_of_tokenizer(base.tokenizer)[:8]}{path.suffix}")


def _check_data(shard: Shard, tasks: Mapping[str, Task]) -> None:
    for name, planned in shard.data.items():
        if tasks[name].data_hash != planned:
            raise TaskError(
                f"task '{name}' of '{shard.tasks}' must have the same rows on every machine",
                found=f"hash {tasks[name].data_hash} here, {planned} where the build was planned",
                remedy="put the tasks on a file system that all machines mount, and start again if they changed",
            )


@lru_cache(maxsize=1)
def _resident_base(reference: str, dtype: str, device: str) -> Base:
    return load_base(reference, dtype=dtype, device=device)


@lru_cache(maxsize=4)
def _resident_tasks(reference: str, names: tuple[str, ...], columns: str | None) -> dict[str, Task]:
    return load_tasks(reference, names=names, columns=columns)


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
        library: records what is done.
        tasks: by name.
        display: where progress is shown.
        callbacks: watch the training; who opened them closes them.

    Raises:
        TrainError: if a loss is not finite, or a checkpoint cannot be written.
        LibraryError: if the library cannot be written.
    """
    settings = shard.units[0].settings
    targets = {unit.name: targets_of(base, unit.settings) for unit in shard.units}
    shapes = {path: shape for unit_targets in targets.values() for path, shape in unit_targets.items()}
    template = template_for(base, settings)
    jobs = [make_job(unit, tasks, template, frozenset(targets[unit.name])) for unit in shard.units]
    by_name = {unit.name: unit for unit in shard.units}

    def commit(trained: TrainedUnit) -> None:
        unit = by_name[trained.name]
        if unit.name not in library:  # a run that was killed may have committed it just before
            adapter = to_adapter(unit, trained.adapters[unit.name], base)
            library.add_adapter(adapter, provenance_of(unit, trained, tasks, base, shard.run))

    with (
        display.bar(f"training {len(jobs)} experts", sum(job.num_steps for job in jobs)) as bar,
        opened_logs(shard.run.logs, Path(shard.logs), shard.log) as logs,
    ):
        watch = TrainingBar(bar, {job.name: job.num_steps for job in jobs}, library.names())
        train_queue(
            base.model,
            jobs,
            expert_stack(base.model, shapes, jobs, shard.run.window),
            loop_settings(settings, shard.run),
            checkpoint=_checkpoint(shard, base),
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
        max_tokens=None if isinstance(run.max_tokens, str) else run.max_tokens,
        save_every_s=run.save_every_s,
        activation_checkpointing=run.activation_checkpointing,
        autocast=run.autocast,
    )
