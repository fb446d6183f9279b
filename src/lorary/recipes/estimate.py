"""`lorary build --dry-run`: what a build takes, from its plan and two steps measured here. Nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorary.build.build_library import choose_tasks, separate_tasks
from lorary.build.experts import targets_of
from lorary.build.jobs import ExpertSpec, make_job
from lorary.build.memory import Measurement, measure
from lorary.build.methods import MethodSettings
from lorary.build.plan import plan_stages
from lorary.build.poly import poly_stack
from lorary.build.settings import BuildSettings, BuildSource, RunSettings
from lorary.build.shards import loop_settings, template_for
from lorary.data.batching import input_length
from lorary.display import Display
from lorary.model.base import Base, load_base
from lorary.train.flat import FlatParameters
from lorary.train.onednn import packed_bytes
from lorary.train.stack import expert_stack
from lorary.train.units import Job

# A forward pass alone against forward and backward: the base is frozen, so that backward costs about as much again.
EVALUATION_COST = 0.5


@dataclass(frozen=True)
class Estimate:
    """What a build takes.

    Args:
        method: how tasks are assigned to experts.
        experts: one row per expert that is still to be trained: stage, name, tasks, steps, passes over its rows,
            tokens that its training is fed, parameters.
        kept: experts that are in the library already.
        steps: optimiser steps of all experts.
        tokens: tokens of all rows that are trained on, padding left out.
        tokens_computed: tokens that are computed for them, shared prefixes counted once and padding counted.
        parameters: of all experts.
        memory: bytes of the base, of the experts in training with their optimiser, of activations, and of the copies of
            weights that a CPU multiplies by.
        seconds: for training and evaluations, on this machine as it is now.
        notes: what had to be assumed.
    """

    method: str
    experts: list[dict[str, Any]]
    kept: list[str]
    steps: int
    tokens: int
    tokens_computed: int
    parameters: int
    memory: dict[str, int]
    seconds: float
    notes: list[str]

    def text(self) -> str:
        """The estimate for a reader."""
        lines = [f"{'expert':<32} {'tasks':>5} {'steps':>7} {'passes':>7} {'tokens':>12} {'parameters':>12}"]
        for row in self.experts:
            name = row["name"] if row["stage"] != "private adapters" else f"{row['name']} (private)"
            lines.append(
                f"{name:<32} {len(row['tasks']):>5} {row['steps']:>7} {row['passes']:>7.1f} {row['tokens']:>12,} "
                f"{row['parameters']:>12,}"
            )
        memory = ", ".join(f"{part} {size / 2**20:,.0f} MiB" for part, size in self.memory.items())
        share = self.tokens_computed / max(self.tokens, 1)
        lines += [
            f"experts: {len(self.experts)} to train, {len(self.kept)} kept; {self.parameters:,} parameters",
            f"steps: {self.steps:,}; tokens: {self.tokens:,}, of which {share:.0%} are computed",
            f"memory: {memory}",
            f"time: about {self.seconds:,.0f} s on this machine as it is now",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Planned:
    """A unit with its rows, in its stage."""

    stage: str
    unit: ExpertSpec
    job: Job


def run_estimate(
    tasks_reference: str,
    library_path: str,
    settings: BuildSettings,
    method: MethodSettings,
    *,
    source: BuildSource | None = None,
    run: RunSettings | None = None,
) -> Estimate:
    """Plan a build and measure two steps of it. Neither the library nor anything else is written.

    Args:
        tasks_reference: as for `run_build`, and so are the others.
        library_path: folder of the library; experts that it holds count as done.
        settings: how to train.
        method: how to assign tasks to experts.
        source: base and tasks.
        run: how to run.

    Returns:
        The estimate.

    Raises:
        LoraryError: as `run_build` refuses tasks, base or settings.
    """
    source, run = source or BuildSource(), run or RunSettings()
    chosen = choose_tasks(tasks_reference, source.names, source.columns)
    tasks, _ = separate_tasks(chosen, source.held_out, source.overlap, Display())
    loaded = load_base(source.base, dtype=run.dtype, device=run.device)
    stages, notes = plan_stages(tasks, library_path, settings, method, loaded, run)
    kept = [unit.name for stage in stages for unit in stage.units if unit.name in stage.existing]
    planned = [
        _Planned(
            stage.name, unit, make_job(unit, tasks, template_for(loaded, unit.settings), _targets(loaded, unit, method))
        )
        for stage in stages
        for unit in stage.units
        if unit.name not in stage.existing
    ]
    nothing = Measurement(1.0, 1.0, 0, 0, run.fixed_tokens)
    measured = _measure(loaded, planned, settings, method, run) if planned else nothing
    if planned and measured.max_tokens != run.max_tokens:
        notes.append(f"micro-batches of {measured.max_tokens:,} tokens here, for --max-tokens {run.max_tokens}")
    return _summary(loaded, method, planned, kept, measured, run, notes)


def _targets(base: Base, unit: ExpertSpec, method: MethodSettings) -> frozenset[str] | None:
    return None if method.is_poly else frozenset(targets_of(base, unit.settings))


def _measure(
    base: Base, planned: Sequence[_Planned], settings: BuildSettings, method: MethodSettings, run: RunSettings
) -> Measurement:
    """Measured on the first stage: what follows trains the same layers on the same rows."""
    first = [entry for entry in planned if entry.stage == planned[0].stage]
    jobs = [entry.job for entry in first]
    stack: FlatParameters
    if method.is_poly:
        stack = poly_stack(base, first[0].unit, method.poly)
        settings = first[0].unit.settings
    else:
        shapes = {path: shape for entry in first for path, shape in targets_of(base, entry.unit.settings).items()}
        stack = expert_stack(base.model, shapes, jobs, run.window)
    return measure(base.model, jobs, stack, loop_settings(settings, run))


def _summary(
    base: Base,
    method: MethodSettings,
    planned: Sequence[_Planned],
    kept: list[str],
    measured: Measurement,
    run: RunSettings,
    notes: list[str],
) -> Estimate:
    rows = [_row(base, method, entry) for entry in planned]
    tokens = sum(row["tokens"] for row in rows)
    evaluated = sum(
        (min(entry.unit.settings.evals, entry.job.num_steps) + 1) * sum(input_length(x) for x in entry.job.val)
        for entry in planned
    )
    return Estimate(
        method=method.method,
        experts=rows,
        kept=kept,
        steps=sum(row["steps"] for row in rows),
        tokens=tokens,
        tokens_computed=round(tokens * measured.computed),
        parameters=sum(row["parameters"] for row in rows),
        memory={
            "base": sum(p.numel() * p.element_size() for p in base.model.parameters()),
            "experts": measured.state_bytes,
            "activations": measured.activation_bytes,
            "reordered weights": 0 if run.autocast else packed_bytes(base.model),
        },
        seconds=(tokens + EVALUATION_COST * evaluated) / measured.tokens_per_s,
        notes=notes,
    )


def _row(base: Base, method: MethodSettings, entry: _Planned) -> dict[str, Any]:
    job, settings = entry.job, entry.unit.settings
    fed = job.num_steps * settings.batch_size
    parameters = sum(settings.rank * (d_in + d_out) for d_in, d_out in targets_of(base, settings).values())
    return {
        "stage": entry.stage,
        "name": entry.unit.name,
        "tasks": list(entry.unit.tasks),
        "steps": job.num_steps,
        "passes": fed / len(job.train),
        "tokens": round(fed * _mean_length(job)),
        "parameters": parameters * (method.poly.skills if method.is_poly else 1),
    }


def _mean_length(job: Job) -> float:
    """Mean tokens of a row, as often as each task is drawn."""
    lengths = [input_length(example) for example in job.train]
    if not job.task_weights:
        return sum(lengths) / len(lengths)
    means = []
    for number in range(len(job.task_weights)):
        task_lengths = [length for length, task in zip(lengths, job.train_tasks, strict=True) if task == number]
        means.append(sum(task_lengths) / len(task_lengths))
    return sum(w * mean for w, mean in zip(job.task_weights, means, strict=True)) / sum(job.task_weights)
