"""`lorary build`: tasks become a library of experts. The library is the ledger, so that a killed build goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorary.adapter import Adapter
from lorary.data.tasks import Task, load_tasks
from lorary.data.template import Template, make_template, warn_of_cuts
from lorary.errors import LibraryError, TaskError, UsageError
from lorary.formats.peft import tensors_of
from lorary.formats.peft_config import new_config
from lorary.library.folders import check_name
from lorary.library.store import Library
from lorary.lora.targets import find_targets, num_layers
from lorary.model.base import Base, load_base
from lorary.recipes.build_settings import BuildSettings
from lorary.recipes.display import Display
from lorary.recipes.open import BUILD_FOLDER, created_for
from lorary.train.loop import ExpertData, Hooks, LoopSettings, TrainedExpert, train_window
from lorary.train.optimiser import OptimiserSettings


@dataclass(frozen=True)
class BuildResult:
    """What a build did.

    Args:
        library: path of the library.
        trained: names of the experts trained by this run.
        kept: names of those that were there already.
        val_losses: for each expert, the validation loss of the bare base and of the expert, nats per target token.
    """

    library: str
    trained: list[str]
    kept: list[str]
    val_losses: dict[str, tuple[float, float]]


def run_build(
    tasks_reference: str,
    library_path: str,
    settings: BuildSettings,
    *,
    base: str = "embedded",
    names: Sequence[str] | None = None,
    window: int = 16,
    max_tokens: int = 1024,
    device: str = "auto",
    dtype: str = "auto",
) -> BuildResult:
    """Load tasks and base, open or make the library, and build.

    Args:
        tasks_reference: as `lorary.data.tasks.load_tasks` takes it.
        library_path: folder of the library, new or not.
        settings: how to train.
        base: the base model.
        names: tasks to take; where None, all whose role is to be trained on.
        window: experts trained in one pass.
        max_tokens: padded tokens of one micro-batch.
        device: where to run.
        dtype: of the base.

    Returns:
        What was built.
    """
    tasks = load_tasks(tasks_reference, names=names)
    chosen = {name: task for name, task in tasks.items() if names is not None or task.role == "train"}
    if not chosen:
        raise TaskError(
            f"'{tasks_reference}' must have tasks to train on", found=f"{len(tasks)} tasks, all held out",
            remedy="name them with --tasks to train on them all the same",
        )  # fmt: skip
    for name in chosen:
        check_name(name)
    loaded = load_base(base, dtype=dtype, device=device)
    with created_for(library_path, base) as library:
        return build_private(loaded, library, chosen, settings, window=window, max_tokens=max_tokens)


def build_private(
    base: Base,
    library: Library,
    tasks: Mapping[str, Task],
    settings: BuildSettings,
    *,
    window: int = 16,
    max_tokens: int = 1024,
    display: Display | None = None,
) -> BuildResult:
    """Train one expert per task and commit each to the library.

    Args:
        base: the frozen base model.
        library: over that base; experts it already holds from the same build are kept.
        tasks: tasks with training and validation rows.
        settings: how to train.
        window: experts trained in one pass.
        max_tokens: padded tokens of one micro-batch.
        display: where progress is shown.

    Returns:
        What was trained, what was kept, and the validation losses.

    Raises:
        LibraryError: if the library holds an expert of the same name from another build, or another build runs on it.
        BaseModelError: if the model is not the library's base.
        TaskError: if a task lacks training or validation rows.
        TrainError: if a loss is not finite, or a checkpoint cannot be written.
    """
    display = display or Display()
    if max_tokens < 1:
        raise UsageError("--max-tokens must be at least 1", found=max_tokens)
    targets = find_targets(base.model, settings.target_modules, _layers(base, settings))
    template = make_template(settings.template, base.tokenizer, max_length=base.most_tokens(settings.max_length))
    with library.build_lock():
        library.check_base(base.model)
        kept = [name for name in tasks if name in library]
        for name in kept:
            _check_same_build(library, tasks[name], settings, base)
        pending = {name: task for name, task in tasks.items() if name not in kept}
        if kept:
            display.say(f"{len(kept)} of {len(tasks)} experts are in the library already")
        trained = []
        base_dtype = str(base.model.dtype)
        for num_steps, names in plan_windows(library, pending, tasks, settings, window, base_dtype):
            data = [expert_data(tasks[name], template, settings) for name in names]
            checkpoint = _checkpoint_path(library, names, settings, tasks, base_dtype)
            for expert in _train(base, data, targets, settings, num_steps, max_tokens, checkpoint, display):
                if expert.name in pending:
                    library.add_adapter(*_to_adapter(expert, base, targets, settings, tasks[expert.name]))
                    trained.append(expert.name)
            checkpoint.unlink(missing_ok=True)
    return BuildResult(str(library.path), trained, kept, {name: _val_losses(library, name) for name in tasks})


def plan_windows(
    library: Library,
    pending: Mapping[str, Task],
    tasks: Mapping[str, Task],
    settings: BuildSettings,
    window: int,
    base_dtype: str,
) -> list[tuple[int, list[str]]]:
    """(steps, names) of each pass: experts that take the same number of steps, at most `window` at once.

    A pass that was killed left a checkpoint under the names it was started with, some of which may be committed by
    now: it is taken up with those names.

    Returns:
        The passes, in order.
    """
    if window < 1:
        raise UsageError("--window must be at least 1", found=window)

    def passes(chosen: Mapping[str, Task]) -> list[tuple[int, list[str]]]:
        by_steps: dict[int, list[str]] = {}
        for name in sorted(chosen):
            by_steps.setdefault(settings.num_steps(len(_train_rows(chosen[name], settings))), []).append(name)
        return [
            (steps, names[start : start + window])
            for steps, names in sorted(by_steps.items())
            for start in range(0, len(names), window)
        ]

    interrupted = [
        (steps, names)
        for steps, names in passes(tasks)
        if _checkpoint_path(library, names, settings, tasks, base_dtype).exists()
        and any(name in pending for name in names)
    ]
    covered = {name for _, names in interrupted for name in names}
    return interrupted + passes({name: task for name, task in pending.items() if name not in covered})


def expert_data(task: Task, template: Template, settings: BuildSettings) -> ExpertData:
    """Encode what one expert is trained on.

    Raises:
        TaskError: if the task lacks training or validation rows.
    """
    rows = {"train": _train_rows(task, settings), "val": task.split("val")[: settings.val_rows]}
    for split, members in rows.items():
        if not members:
            raise TaskError(f"task '{task.name}' must have {split} rows to build an expert", found="none")
    train, val = ([template.encode(row.source, row.target) for row in rows[split]] for split in ("train", "val"))
    warn_of_cuts(task.name, [*train, *val])
    return ExpertData(task.name, train, val)


def _train_rows(task: Task, settings: BuildSettings) -> Sequence[Any]:
    return task.split("train")[: settings.train_rows]


def _train(
    base: Base,
    data: Sequence[ExpertData],
    targets: dict[str, tuple[int, int]],
    settings: BuildSettings,
    num_steps: int,
    max_tokens: int,
    checkpoint: Path,
    display: Display,
) -> list[TrainedExpert]:
    optimiser = OptimiserSettings(
        settings.learning_rate, num_steps, settings.warmup, settings.clip, settings.weight_decay
    )
    loop = LoopSettings(
        optimiser,
        batch_size=settings.batch_size,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        num_evals=min(settings.evals, num_steps),
        seed=settings.seed,
        init=settings.init,
        init_scale=settings.init_scale,
        max_tokens=max_tokens,
    )
    with display.bar(f"training {len(data)} experts", num_steps) as bar:

        def on_step(step: int, losses: dict[str, float]) -> None:
            bar.advance_to(step, f"mean loss {sum(losses.values()) / len(losses):.3f}")

        return train_window(base.model, data, targets, loop, checkpoint, Hooks(on_step=on_step))


def _layers(base: Base, settings: BuildSettings) -> list[int] | None:
    if settings.upper_layers is None:
        return None
    total = num_layers(base.model)
    if settings.upper_layers > total:
        raise UsageError(f"--upper-layers must be at most {total}, the base's layers", found=settings.upper_layers)
    return list(range(total - settings.upper_layers, total))


def _to_adapter(
    expert: TrainedExpert,
    base: Base,
    targets: Mapping[str, tuple[int, int]],
    settings: BuildSettings,
    task: Task,
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and provenance of a finished expert."""
    whole = settings.upper_layers is None and "all-linear" not in settings.target_modules
    config = new_config(
        base.files.name,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=sorted(settings.target_modules) if whole else sorted(targets),
        dropout=settings.dropout,
    )
    adapter = Adapter(expert.name, expert.modules, config, tensors_of(expert.modules))
    (_, base_loss), best_loss = expert.val_losses[0], min(loss for _, loss in expert.val_losses)
    provenance = {
        "method": "private",
        "tasks": [task.name],
        "families": {task.name: task.family},
        "data_hashes": {task.name: task.data_hash},
        "settings": asdict(settings),
        "seed": settings.seed,
        "template": settings.template,
        "base_dtype": str(base.model.dtype),
        "metrics": {
            "val_loss_base": base_loss,
            "val_loss": best_loss,
            "best_step": expert.best_step,
            "val_losses": expert.val_losses,
            "train_losses": expert.train_losses,
        },
        "parents": [],
        "versions": {package: version(package) for package in ("lorary", "torch", "transformers")},
    }
    return adapter, provenance


def _check_same_build(library: Library, task: Task, settings: BuildSettings, base: Base) -> None:
    """An expert that is there already counts as finished only if this build would train it alike."""
    known = library.provenance(task.name)
    wanted = {
        "settings": asdict(settings),
        "data_hashes": {task.name: task.data_hash},
        "base_dtype": str(base.model.dtype),
    }
    for key, value in wanted.items():
        recorded, own = known.get(key), json.loads(json.dumps(value))
        if recorded != own:
            differing = _difference(recorded, own)
            raise LibraryError(
                f"library '{library.path}' must not hold an expert '{task.name}' from another build",
                found=f"other {key}: {differing}",
                remedy=f"build into another library, or: lorary library remove {library.path} {task.name}",
            )


def _difference(recorded: Any, wanted: Any) -> str:
    if recorded is None:
        return "none recorded"
    if not isinstance(recorded, Mapping) or not isinstance(wanted, Mapping):
        return f"{recorded} instead of {wanted}"
    keys = [key for key in wanted if recorded.get(key) != wanted[key]]
    return ", ".join(f"{key} {recorded.get(key)!r} instead of {wanted[key]!r}" for key in keys)


def _checkpoint_path(
    library: Library, names: Sequence[str], settings: BuildSettings, tasks: Mapping[str, Task], base_dtype: str
) -> Path:
    """Where a pass keeps its state: keyed by all that decides it, so that another build never takes it up."""
    data = {name: tasks[name].data_hash for name in names}
    key = {"settings": asdict(settings), "data": data, "base_dtype": base_dtype}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return library.path / BUILD_FOLDER / f"{digest}.safetensors"


def _val_losses(library: Library, name: str) -> tuple[float, float]:
    metrics = library.provenance(name)["metrics"]
    return float(metrics["val_loss_base"]), float(metrics["val_loss"])
