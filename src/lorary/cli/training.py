"""Options that the commands which train share."""

from typing import Annotated

import typer

Preset = Annotated[str, typer.Option(help="default or paper-2024")]
LearningRate = Annotated[float | None, typer.Option(help="peak of the schedule")]
Dropout = Annotated[float | None, typer.Option(help="on the adapters' input, while training")]
Evals = Annotated[int | None, typer.Option(help="how often the validation loss is taken")]
TrainRows = Annotated[int | None, typer.Option(help="use the first so many training rows of a task")]
ValRows = Annotated[int | None, typer.Option(help="use the first so many validation rows of a task")]
TrainLength = Annotated[int | None, typer.Option(help="tokens of a row; longer prompts lose their start")]
MaxTokens = Annotated[int, typer.Option(help="tokens of one micro-batch")]
ActivationCheckpointing = Annotated[
    bool, typer.Option("--activation-checkpointing", help="compute activations twice, to save memory")
]
Log = Annotated[list[str] | None, typer.Option(help="jsonl, tensorboard, wandb or trackio; may be repeated (jsonl)")]
SaveEvery = Annotated[float, typer.Option(help="seconds between checkpoints")]
