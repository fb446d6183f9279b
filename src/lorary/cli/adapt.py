"""`lorary adapt`: parse, call one recipe, say where the result lies."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.cli.options import (
    Device,
    Dtype,
    Json,
    LibraryPath,
    OptionalBase,
    TaskNames,
    TasksReference,
    Template,
    split_names,
)
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
    from lorary.adapt.adapt_library import AdaptResult


def adapt(
    library: LibraryPath,
    tasks: TasksReference,
    method: Annotated[str, typer.Option(help="lora, joint, mu, nearest, poly, poly-z, cat or lorahub")] = "lora",
    names: TaskNames = None,
    into: Annotated[
        str | None, typer.Option(metavar="LIB2", help="library of the results, new or not; LIB itself otherwise")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the result, for one task; TASK-METHOD otherwise")] = None,
    experts: Annotated[str | None, typer.Option(help="adapters to use, separated by commas; all otherwise")] = None,
    start: Annotated[str | None, typer.Option(help="joint: adapter to start from (joint)")] = None,
    start_library: Annotated[
        str | None, typer.Option(metavar="LIB3", help="joint: library that holds it; LIB otherwise")
    ] = None,
    sk: Annotated[int | None, typer.Option("--sk", help="retrieve so many adapters for each task (nearest: 1)")] = None,
    retrieve: Annotated[str | None, typer.Option(help="--sk: by loss, delta or random")] = None,
    retrieve_rows: Annotated[int | None, typer.Option(help="--retrieve loss: training rows looked at (16)")] = None,
    mix: Annotated[str | None, typer.Option(help="mu, nearest, lorahub: sum factors or outputs")] = None,
    rank: Annotated[int | None, typer.Option(help="of the result: truncates or leaves room")] = None,
    preset: Preset = "default",
    alpha: Annotated[float | None, typer.Option(help="lora: scaling is alpha / rank")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="lora: layers to adapt, separated by commas, or all-linear")
    ] = None,
    upper_layers: Annotated[int | None, typer.Option(help="lora: adapt only that many of the last layers")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps per task; 0 takes the start as it is")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the rows of a task, in place of --steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per step and task")] = None,
    learning_rate: LearningRate = None,
    weights_learning_rate: Annotated[
        float | None, typer.Option(help="poly, poly-z, cat: peak rate of mixing weights")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="lorahub: candidates to try (40)")] = None,
    l1: Annotated[float | None, typer.Option("--l1", help="lorahub: cost of the mean absolute weight (0.05)")] = None,
    dropout: Dropout = None,
    evals: Evals = None,
    patience: Annotated[
        int | None, typer.Option(help="end a task after so many evaluations without improvement")
    ] = None,
    train_rows: TrainRows = None,
    val_rows: ValRows = None,
    template: Template = None,
    max_length: TrainLength = None,
    seed: Annotated[int | None, typer.Option(help="of initial weights, order of rows, dropout and search")] = None,
    window: Annotated[int, typer.Option(help="tasks trained at a time; the others wait for a place")] = 16,
    max_tokens: MaxTokens = 1024,
    activation_checkpointing: ActivationCheckpointing = False,
    log: Log = None,
    save_every: SaveEvery = 15.0,
    base: OptionalBase = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Adapt to new tasks, from scratch or out of a library. Run it again to go on after an interruption."""
    from dataclasses import asdict

    from lorary.adapt.settings import adapt_settings
    from lorary.build.settings import RunSettings
    from lorary.build.settings import preset as preset_settings
    from lorary.errors import UsageError
    from lorary.library.opening import template_of
    from lorary.library.store import Library
    from lorary.recipes.adapt import run_adapt

    targets, chosen = split_names(target_modules), split_names(experts)
    own_layers = {"--alpha": alpha, "--target-modules": targets, "--upper-layers": upper_layers}
    if method != "lora" and retrieve != "delta" and (idle := [key for key, value in own_layers.items() if value]):
        raise UsageError(
            f"{', '.join(idle)} needs --method lora", found=f"--method {method}",
            remedy="leave it out: the layers and the scaling are those of what it begins with",
        )  # fmt: skip
    train = preset_settings(
        preset,
        alpha=alpha,
        target_modules=None if targets is None else tuple(targets),
        upper_layers=upper_layers,
        steps=steps or None,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        evals=evals,
        patience=patience,
        train_rows=train_rows,
        val_rows=val_rows,
        template=template or template_of(Library.open(library), None),
        max_length=max_length,
        seed=seed,
    )
    settings = adapt_settings(
        method,
        train,
        rank=rank,
        name=name,
        experts=None if chosen is None else tuple(chosen),
        start=start,
        start_library=start_library,
        zero_shot=steps == 0 or None,
        mix=mix,
        sk=sk,
        retrieve=retrieve,
        retrieve_rows=retrieve_rows,
        weights_learning_rate=weights_learning_rate,
        budget=budget,
        l1=l1,
    )
    logs = ("jsonl",) if log is None else tuple(dict.fromkeys(log))
    run = RunSettings(window, max_tokens, device, dtype, activation_checkpointing, logs, save_every)
    result = run_adapt(library, tasks, settings, names=split_names(names), into=into, base=base, run=run)
    print(json.dumps(asdict(result))) if as_json else _print(result)


def _print(result: "AdaptResult") -> None:
    print(f"{'adapter':<36} {'base':>8} {'start':>8} {'adapted':>8}   validation loss, nats per target token")
    for task, name in result.names.items():
        losses = "".join(f" {loss:>8.3f}" for loss in result.val_losses[task])
        parents = result.parents[task]
        notes = [", ".join(parents) if len(parents) <= 5 else f"{len(parents)} adapters"] if parents else []
        if result.errors[task]:
            notes.append(f"truncated: {result.errors[task]:.1%} of the update left out")
        print(f"{name:<36}{losses}   {'; '.join(notes)}".rstrip())
    print(f"{len(result.adapted)} tasks adapted to, {len(result.kept)} kept: {result.library}")
