"""Watching a training from a recipe: the bar in the terminal, and the logs beside the library."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lorary.display import Bar
from lorary.train.callbacks import Callback, JsonlCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from lorary.train.units import TrainedUnit

# Weight of the past in the speed that is shown.
SMOOTHING = 0.9


class TrainingBar(Callback):
    """Shows steps over all experts, and how fast tokens pass.

    Args:
        bar: over the steps of all experts.
        steps: steps of each expert, by name.
        finished: experts that were finished before.
    """

    def __init__(self, bar: Bar, steps: Mapping[str, int], finished: Collection[str]) -> None:
        self._bar, self._steps, self._speed = bar, dict(steps), 0.0
        self._finished = {name for name in finished if name in steps}

    def on_step(self, steps: Mapping[str, int], losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Move the bar."""
        speed = tokens / max(seconds, 1e-9)
        self._speed = SMOOTHING * self._speed + (1 - SMOOTHING) * speed if self._speed else speed
        self._finished -= steps.keys()  # committed by a run that was killed before it had noted so
        done = sum(self._steps[name] for name in self._finished) + sum(steps.values())
        ended = len(self._finished) + sum(number == self._steps[name] for name, number in steps.items())
        experts = f"{ended}/{len(self._steps)} experts"
        loss = sum(losses.values()) / len(losses)
        self._bar.advance_to(done, f"{experts}, mean loss {loss:.3f}, {self._speed:.0f} tokens/s")

    def on_budget(self, max_tokens: int, reason: str) -> None:
        """Say so."""
        self._bar.say(f"{max_tokens:,} tokens a micro-batch: {reason}")

    def on_finish(self, unit: TrainedUnit) -> None:
        """Count a finished expert; the steps that one had left when it stopped early are spared, not done."""
        spared = self._steps[unit.name] - unit.val_losses[-1][0]
        self._steps[unit.name] -= spared
        self._bar.spare(spared)
        self._finished.add(unit.name)


@contextmanager
def opened_logs(kinds: Sequence[str], folder: Path, name: str) -> Iterator[list[Callback]]:
    """The callbacks that write metrics down, closed at the end, whatever happens.

    Args:
        kinds: words of `lorary.build.settings.LOGS`.
        folder: for what is written to files.
        name: of the run: file or folder name in there.

    Yields:
        The callbacks.

    Raises:
        MissingExtraError: if a package is not installed.
    """
    with ExitStack() as stack:
        logs = []
        for kind in kinds:
            logs.append(_open_log(kind, folder, name))
            stack.callback(logs[-1].close)
        yield logs


def _open_log(kind: str, folder: Path, name: str) -> Callback:
    if kind == "jsonl":
        return JsonlCallback(folder / f"{name}.jsonl")
    if kind == "tensorboard":
        return TensorBoardCallback(folder / "tensorboard" / name)
    return WandbCallback() if kind == "wandb" else TrackioCallback()
