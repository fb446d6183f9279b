"""Checkpoints of a queue: four vectors and the history, written aside and renamed.

There is no random state to store: whatever is drawn is keyed by (seed, unit, step).
"""

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorary.errors import TrainError
from lorary.library.files import replace_file
from lorary.reading import open_regular
from lorary.train.slots import Progress, Slots
from lorary.train.units import Job

# What decides when and how, and not what a unit becomes.
_FREE_SETTINGS = ("max_tokens", "save_every_s", "activation_checkpointing")


def save_checkpoint(path: Path, slots: Slots) -> None:
    """Store the state of a queue, replacing the last one atomically.

    Raises:
        TrainError: if it cannot be written; the last checkpoint stays.
    """
    units = [None if slot is None else {"name": slot.job.name, **asdict(slot.progress)} for slot in slots.slots]
    budget = {"requested": slots.settings.max_tokens, "max_tokens": slots.max_tokens}
    progress = json.dumps({"queue": queue_key(slots), "waiting": slots.waiting, "units": units, "budget": budget})
    tensors = {key: tensor.detach().cpu() for key, tensor in _vectors(slots).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A worker that was given up may still write beside its successor: each has a file of its own.
        aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        replace_file(path, save(tensors, {"progress": progress}), aside, follow_links=False)
    except OSError as error:
        raise TrainError(
            f"the checkpoint '{path}' must be writable", found=error, remedy="free space, then rerun"
        ) from error


def load_checkpoint(path: Path, slots: Slots) -> bool:
    """Fill the state of a queue from a checkpoint.

    The tokens of a micro-batch are those that the run before had measured or come down to, so that rows are laid out
    as they were; unless another number is asked for now.

    Args:
        path: the file.
        slots: of the same queue, empty; filled in place, and left alone where the file is refused.

    Returns:
        Whether there was a checkpoint.

    Raises:
        TrainError: if the file is damaged or of another queue.
    """
    if not os.path.lexists(path):
        return False
    try:
        with open_regular(path, follow_links=False):  # safetensors itself would follow a link
            pass
        stored, waiting, seated, max_tokens = _read(path, slots)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainError(
            f"the checkpoint '{path}' must be one of this build",
            found=error,
            remedy="delete it, or repeat the build it is of",
        ) from error
    for index, job, progress in seated:
        slots.seat(index, job).progress = progress
    slots.waiting, slots.max_tokens = waiting, max_tokens
    for key, vector in _vectors(slots).items():
        vector.copy_(stored[key])
    return True


def _read(path: Path, slots: Slots) -> tuple[dict[str, Tensor], int, list[tuple[int, Job, Progress]], int | None]:
    """The vectors, the position in the queue, who sits where, all checked against the queue, and the budget."""
    vectors = _vectors(slots)
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in vectors}
        state = json.loads((file.metadata() or {})["progress"])
    if state["queue"] != queue_key(slots):
        raise ValueError("other experts, settings or window")
    for key, vector in vectors.items():
        # copy_ would spread a smaller tensor and round a wider one without a word.
        if (stored[key].shape, stored[key].dtype) != (vector.shape, vector.dtype):
            raise ValueError(f"'{key}' is {tuple(stored[key].shape)} {stored[key].dtype}")
    jobs = {job.name: job for job in slots.jobs}
    units = [(index, unit) for index, unit in enumerate(state["units"]) if unit is not None]
    seated = [(index, jobs[unit["name"]], _parse(unit)) for index, unit in units]
    return stored, int(state["waiting"]), seated, _budget(state["budget"], slots.settings.max_tokens)


def queue_key(slots: Slots) -> str:
    """sha256 over what a checkpoint must share with the queue that takes it up: jobs in order, settings, slots."""
    jobs = [
        [job.name, job.num_steps, job.rank, job.alpha, job.targets and sorted(job.targets), list(job.task_weights),
         len(job.train), len(job.val), *_start_key(job)]
        for job in slots.jobs
    ]  # fmt: skip
    settings = {key: value for key, value in asdict(slots.settings).items() if key not in _FREE_SETTINGS}
    document = json.dumps([jobs, settings, len(slots.slots)], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()


def _start_key(job: Job) -> list[object]:
    """sha256 over the factors that a job begins with; nothing where it has none."""
    if job.start is None:
        return []
    digest = hashlib.sha256()
    for path, factors in sorted(job.start.items()):
        digest.update(f"\n{path} {factors.scaling!r} {tuple(factors.lora_a.shape)}\n".encode())
        for factor in (factors.lora_a, factors.lora_b):
            digest.update(factor.detach().cpu().double().numpy().tobytes())
    return [digest.hexdigest()]


def _vectors(slots: Slots) -> dict[str, Tensor]:
    optimiser = slots.optimiser
    return {
        "parameters": slots.stack.parameters, "first": optimiser.first, "second": optimiser.second, "best": slots.best
    }  # fmt: skip


def _budget(recorded: Mapping[str, Any], requested: int | None) -> int | None:
    """Tokens of a micro-batch: as recorded where the same is asked for now, else as asked for."""
    max_tokens = recorded["max_tokens"]
    if not (max_tokens is None or (type(max_tokens) is int and max_tokens >= 1)):
        raise ValueError(f"max_tokens {max_tokens!r}")
    return max_tokens if recorded["requested"] == requested else requested


def _parse(unit: Mapping[str, Any]) -> Progress:
    train = [float(loss) for loss in unit["train_losses"]]
    val = [(int(step), float(loss)) for step, loss in unit["val_losses"]]
    return Progress(int(unit["step"]), train, val)
