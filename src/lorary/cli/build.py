"""`lorary build`: parse, call one recipe, say where the result lies."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli.options import BASE_HELP, Device, Dtype, Json, TaskNames, TasksReference, Template, split_names
from lorary.cli.training import (
    ActivationCheckpointing,
    Dropout,
    Evals,
    LearningRate,
    Log,
    MaxTokens,
    Preset,
    SaveEvery,
    TrainLength,
    TrainRows,
    ValRows,
)

if TYPE_CHECKING:
    from lorary.build.build_library import BuildResult


def build(
    tasks: TasksReference,
    library: Annotated[str, typer.Option("--library", metavar="LIB", help="folder of the library, new or not")],
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "embedded",
    method: Annotated[str, typer.Option(help="private, joint, mbc, poly or mhr")] = "private",
    names: TaskNames = None,
    held_out: Annotated[
        str | None, typer.Option(metavar="TASKS", help="tasks to keep apart from those that are trained on")
    ] = None,
    overlap: Annotated[str, typer.Option(help="report what overlaps them, or drop the tasks that do")] = "report",
    preset: Preset = "default",
    rank: Annotated[int | None, typer.Option(help="rank of every expert")] = None,
    alpha: Annotated[float | None, typer.Option(help="scaling is alpha / rank")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="layers to adapt, separated by commas, or all-linear")
    ] = None,
    upper_layers: Annotated[int | None, typer.Option(help="adapt only that many of the last layers")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps per expert")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the rows of an expert, in place of --steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step and expert")] = None,
    learning_rate: LearningRate = None,
    dropout: Dropout = None,
    evals: Evals = None,
    patience: Annotated[
        int | None, typer.Option(help="end an expert after so many evaluations without improvement")
    ] = None,
    train_rows: TrainRows = None,
    val_rows: ValRows = None,
    sampling: Annotated[
        str | None, typer.Option(help="tasks of an expert: proportional, uniform or a temperature")
    ] = None,
    template: Template = None,
    max_length: TrainLength = None,
    init: Annotated[str | None, typer.Option(help="shared or own initial weights")] = None,
    seed: Annotated[int | None, typer.Option(help="of initial weights, order of rows and dropout")] = None,
    overrides: Annotated[
        str | None, typer.Option(metavar="FILE.json", help='other settings of single experts: {"NAME": {"rank": 8}}')
    ] = None,
    k: Annotated[str | None, typer.Option("--k", help="mbc: clusters, auto, or 5,10,25 to try each (10)")] = None,
    cluster_by: Annotated[str | None, typer.Option(help="mbc: mbc, random, text or family")] = None,
    cluster_method: Annotated[str | None, typer.Option(help="mbc: delta or paper-2024")] = None,
    cluster_seed: Annotated[int | None, typer.Option(help="mbc: of the clustering (42)")] = None,
    private: Annotated[
        str | None, typer.Option(metavar="LIB2", help="mbc: library of the private adapters, made if need be")
    ] = None,
    private_steps: Annotated[int | None, typer.Option(help="mbc: steps of a private adapter")] = None,
    private_epochs: Annotated[float | None, typer.Option(help="mbc: passes over its rows")] = None,
    skills: Annotated[int | None, typer.Option(help="poly, mhr: skills to mix (8)")] = None,
    splits: Annotated[int | None, typer.Option(help="mhr: blocks of a layer, each mixed by itself (4)")] = None,
    logits_learning_rate: Annotated[
        float | None, typer.Option(help="poly, mhr: peak rate of the assignment (0.1)")
    ] = None,
    mu: Annotated[bool, typer.Option("--mu", help="poly, mhr: also commit the mean of the skills")] = False,
    per_task: Annotated[bool, typer.Option("--per-task", help="poly, mhr: also commit each task's mixture")] = False,
    window: Annotated[int, typer.Option(help="experts trained at a time; the others wait for a place")] = 16,
    max_tokens: MaxTokens = 1024,
    activation_checkpointing: ActivationCheckpointing = False,
    log: Log = None,
    executor: Annotated[str, typer.Option(help="local, ray, ray://auto or ray://HOST[:PORT]")] = "local",
    workers: Annotated[int | None, typer.Option(help="ray: processes that train")] = None,
    save_every: SaveEvery = 15.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it takes, and write nothing")] = False,
    as_json: Json = False,
) -> None:
    """Train a library of experts. Run it again to go on after an interruption."""
    from dataclasses import asdict

    from lorary.build.methods import method_settings
    from lorary.build.settings import RunSettings, parse_sampling
    from lorary.build.settings import preset as preset_settings
    from lorary.errors import UsageError
    from lorary.recipes.build import run_build
    from lorary.recipes.estimate import run_estimate
    from lorary.train.choose_executor import make_executor

    targets = split_names(target_modules)
    settings = preset_settings(
        preset,
        rank=rank,
        alpha=alpha,
        target_modules=None if targets is None else tuple(targets),
        upper_layers=upper_layers,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        evals=evals,
        patience=patience,
        train_rows=train_rows,
        val_rows=val_rows,
        sampling=parse_sampling(sampling),
        template=template,
        max_length=max_length,
        init=init,
        seed=seed,
    )
    chosen = method_settings(
        method,
        preset,
        overrides,
        mbc={
            "k": k,
            "by": cluster_by,
            "method": cluster_method,
            "seed": cluster_seed,
            "private": private,
            "private_steps": private_steps,
            "private_epochs": private_epochs,
        },
        poly={"skills": skills, "splits": splits, "logits_learning_rate": logits_learning_rate},
        mu=mu,
        per_task=per_task,
        sampling=sampling,
    )
    if executor == "local" and workers is not None:
        raise UsageError("--workers needs --executor ray", found="--executor local", remedy="leave it out")
    if chosen.is_poly and init == "shared":
        raise UsageError("--init must be own for skills, which would stay alike", found=init, remedy="leave it out")
    logs = ("jsonl",) if log is None else tuple(dict.fromkeys(log))
    run = RunSettings(window, max_tokens, device, dtype, activation_checkpointing, logs, save_every)
    if dry_run:
        estimate = run_estimate(
            tasks, library, settings, chosen, base=base, names=split_names(names), run=run, held_out=held_out,
            overlap=overlap,
        )  # fmt: skip
        print(json.dumps(asdict(estimate)) if as_json else estimate.text())
        return
    where = None if executor == "local" else make_executor(executor, workers=workers, debug="--debug" in sys.argv)
    result = run_build(
        tasks, library, settings, chosen, base=base, names=split_names(names), run=run, executor=where, workers=workers,
        held_out=held_out, overlap=overlap,
    )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print(result)


def _print(result: "BuildResult") -> None:
    for row in result.choice:
        mark = "   chosen" if row["chosen"] else ""
        print(f"k {row['k']:>4}   mean validation loss over tasks {row['val_loss']:.4f}{mark}")
    print(f"{'expert':<32} {'base':>8} {'expert':>8}   validation loss, nats per target token")
    for name, tasks in result.tasks.items():
        losses = [f"{loss:.3f}" for loss in result.val_losses.get(name, ())] or ["-", "-"]
        print(f"{name:<32} {losses[0]:>8} {losses[1]:>8}   {'' if tasks == [name] else ', '.join(tasks)}".rstrip())
    print(f"{len(result.trained)} experts trained, {len(result.kept)} kept: {result.library}")
