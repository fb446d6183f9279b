"""Checkpoints of a window: four vectors and the history, written aside and renamed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorary.errors import TrainError
from lorary.library.files import replace_file
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
    data = save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, path.with_suffix(".tmp"))
    except OSError as error:
        raise TrainError(
            f"the checkpoint '{path}' must be writable", found=error, remedy="free space, then rerun"
        ) from error


def load_checkpoint(
    path: Path, names: Sequence[str], parameters: Tensor, optimiser: ExpertwiseAdamW, best: Tensor
) -> Progress | None:
    """Fill the state of a window from a checkpoint.

    Args:
        path: the file.
        names: the experts of the window, in order.
        parameters: filled in place, as are `optimiser` and `best`; nothing is filled where the file is refused.
        optimiser: over `parameters`.
        best: the parameters at each expert's best validation loss.

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
            stored = {key: file.get_tensor(key) for key in state}
            progress = _parse_progress((file.metadata() or {})["progress"])
        for key, tensor in state.items():
            # copy_ would spread a smaller tensor and round a wider one without a word.
            if (stored[key].shape, stored[key].dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"'{key}' is {tuple(stored[key].shape)} {stored[key].dtype}")
        if tuple(progress.train_losses) != tuple(names):
            raise ValueError(f"experts {list(progress.train_losses)} instead of {list(names)}")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainError(
            f"the checkpoint '{path}' must be one of this build", found=error, remedy="delete it and rerun"
        ) from error
    for key, tensor in state.items():
        tensor.copy_(stored[key])
    return progress


def _parse_progress(text: str) -> Progress:
    stored = json.loads(text)
    losses = {name: [(int(s), float(v)) for s, v in entries] for name, entries in stored["val_losses"].items()}
    return Progress(int(stored["step"]), stored["train_losses"], losses)
