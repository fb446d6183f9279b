"""Checkpoints of a window: four vectors and the history, written aside and renamed."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorary.errors import TrainError
from lorary.train.optimiser import ExpertwiseAdamW


@dataclass
class Progress:
    """How far a window has come: steps done, and losses by expert."""

    step: int = 0
    train_losses: dict[str, list[float]] = field(default_factory=dict)
    val_losses: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def save_checkpoint(
    path: Path, progress: Progress, parameters: Tensor, optimiser: ExpertwiseAdamW, best: Tensor
) -> None:
    """Store the state of a window, replacing the last one atomically.

    Raises:
        TrainError: if it cannot be written; the last checkpoint stays.
    """
    tensors = {"parameters": parameters, "first": optimiser.first, "second": optimiser.second, "best": best}
    metadata = {"progress": json.dumps(progress.__dict__)}
    aside = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise TrainError(
            f"the checkpoint '{path}' must be writable", found=error, remedy="free space, then rerun"
        ) from error


def load_checkpoint(path: Path, parameters: Tensor, optimiser: ExpertwiseAdamW, best: Tensor) -> Progress | None:
    """Fill the state of a window from a checkpoint.

    Returns:
        How far it had come, or None where there is no checkpoint.

    Raises:
        TrainError: if the file is damaged or of another window.
    """
    if not path.exists():
        return None
    state = {"parameters": parameters, "first": optimiser.first, "second": optimiser.second, "best": best}
    try:
        with safe_open(path, framework="pt") as file:
            for key, tensor in state.items():
                tensor.copy_(file.get_tensor(key))
            progress = json.loads(file.metadata()["progress"])
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise TrainError(
            f"the checkpoint '{path}' must be one of this build", found=error, remedy="delete it and rerun"
        ) from error
    losses = {name: [(int(s), float(v)) for s, v in entries] for name, entries in progress["val_losses"].items()}
    return Progress(progress["step"], progress["train_losses"], losses)
