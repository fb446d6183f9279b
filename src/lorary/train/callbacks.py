"""What watches a training: a base class with empty methods, and the ways to write metrics down."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lorary.errors import MissingExtraError
from lorary.library.handles import opened
from lorary.train.units import Factors, Job, TrainedUnit


class Halt(Exception):
    """Raised by a callback's `on_step` to end the training there: it is kept, as after Ctrl-C, and can go on later."""


class Callback:
    """Called by the training loop; every method does nothing unless a subclass says otherwise.

    A resumed training repeats the steps since its last checkpoint, to the same bits: what was written about them
    is written once more, and the last one counts.
    """

    def on_start(self, jobs: Sequence[Job]) -> None:
        """A queue starts or goes on."""

    def on_budget(self, max_tokens: int, reason: str) -> None:
        """Micro-batches hold another number of tokens from now on than was asked for.

        Args:
            max_tokens: of a micro-batch.
            reason: why, in words.
        """

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """One step of all units in training is done.

        Args:
            steps: steps done, by name of the unit.
            losses: training loss before the step, by name of the unit, nats per target token.
            tokens: tokens of all rows of the step, padding left out and shared ones counted for each row.
            seconds: how long the step took.
        """

    def on_eval(self, name: str, step: int, loss: float, adapters: Callable[[], dict[str, Factors]]) -> None:
        """A unit was evaluated.

        Args:
            name: of the unit.
            step: steps done.
            loss: validation loss, nats per target token.
            adapters: makes copies of its present factors, by path, by the name of the adapter.
        """

    def on_finish(self, unit: TrainedUnit) -> None:
        """A unit is finished and was handed over."""

    def close(self) -> None:
        """Nothing more will be watched. Called by whoever made it: the loop does not, so that queues can share one."""


class JsonlCallback(Callback):
    """Appends one JSON object a line to a file, at once, so that a killed run leaves whole lines.

    Args:
        path: the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with opened(path.parent, follow_links=False) as folder:
            descriptor = folder.append(path.name)
        self._file = open(descriptor, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def on_start(self, jobs: Sequence[Job]) -> None:
        """Write the names and steps of all jobs."""
        self._write(event="start", jobs={job.name: job.num_steps for job in jobs})

    def on_budget(self, max_tokens: int, reason: str) -> None:
        """Write the tokens of a micro-batch, and why."""
        self._write(event="budget", max_tokens=max_tokens, reason=reason)

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Write losses, tokens and seconds of a step."""
        self._write(event="step", steps=dict(steps), losses=dict(losses), tokens=tokens, seconds=seconds)

    def on_eval(self, name: str, step: int, loss: float, adapters: Callable[[], dict[str, Factors]]) -> None:
        """Write a validation loss."""
        self._write(event="eval", name=name, step=step, loss=loss)

    def on_finish(self, unit: TrainedUnit) -> None:
        """Write where the best checkpoint of a unit was."""
        self._write(event="finish", name=unit.name, best_step=unit.best_step, stopped_early=unit.stopped_early)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **event: object) -> None:
        self._file.write(json.dumps(event) + "\n")


class TensorBoardCallback(Callback):
    """Writes curves for TensorBoard: `train_loss/NAME` and `val_loss/NAME` over the steps of each unit.

    Args:
        folder: where the event files go.

    Raises:
        MissingExtraError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        _require("tensorboard", "tensorboard")
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Add a point to the training curve of each unit."""
        for name, loss in losses.items():
            self._writer.add_scalar(f"train_loss/{name}", loss, steps[name])

    def on_eval(self, name: str, step: int, loss: float, adapters: Callable[[], dict[str, Factors]]) -> None:
        """Add a point to the validation curve of a unit."""
        self._writer.add_scalar(f"val_loss/{name}", loss, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class _TrackerCallback(Callback):
    """Logs to an experiment tracker whose module has `init`, `log` and `finish`.

    Every point carries `step/NAME`, since the units of a queue are at different steps.
    """

    package: str

    def __init__(self, project: str = "lorary", **settings: Any) -> None:
        self._tracker = _require(self.package, self.package)
        self._tracker.init(project=project, **settings)

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Log step and loss of each unit, and the speed."""
        point: dict[str, float] = {"tokens_per_s": tokens / max(seconds, 1e-9)}
        for name, loss in losses.items():
            point |= {f"step/{name}": steps[name], f"train_loss/{name}": loss}
        self._tracker.log(point)

    def on_eval(self, name: str, step: int, loss: float, adapters: Callable[[], dict[str, Factors]]) -> None:
        """Log a validation loss."""
        self._tracker.log({f"step/{name}": step, f"val_loss/{name}": loss})

    def close(self) -> None:
        """End the tracker's run."""
        self._tracker.finish()


class WandbCallback(_TrackerCallback):
    """Logs to Weights & Biases, which talks to its server unless it is set to work offline.

    Args:
        project: the project.
        settings: what else `wandb.init` takes.

    Raises:
        MissingExtraError: if wandb is not installed.
    """

    package = "wandb"


class TrackioCallback(_TrackerCallback):
    """Logs to trackio, which keeps runs on this machine unless it is told of a Space.

    Args:
        project: the project.
        settings: what else `trackio.init` takes.

    Raises:
        MissingExtraError: if trackio is not installed.
    """

    package = "trackio"


def _require(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, extra) from error
