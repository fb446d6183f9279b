"""What all methods of an adaptation share: its tasks, its pool of adapters, and how a result is committed or kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lorary.adapt.pool import ADAPTATION, Pool
from lorary.adapt.settings import AdaptSettings, recorded_adaptation
from lorary.adapter import LoraFactors
from lorary.build.experts import other_build
from lorary.build.jobs import ExpertSpec, make_job
from lorary.build.settings import RunSettings, as_recorded
from lorary.build.shards import template_for
from lorary.build.state import state_key
from lorary.data.schema import Task
from lorary.data.template import Example
from lorary.data.tokenizer_content import content_of_tokenizer, text_of
from lorary.display import Display
from lorary.errors import LibraryError
from lorary.evaluate.loglik import answer_losses
from lorary.formats.peft_patterns import new_adapter
from lorary.library.layout import BUILD_FOLDER, LOGS
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.train.forward import narrowed
from lorary.train.units import Job


@dataclass(frozen=True)
class AdaptContext:
    """One adaptation.

    Args:
        base: the frozen base model.
        into: the library in which the results go.
        tasks: to adapt to, by name.
        settings: how.
        run: how to run.
        display: where progress is shown.
        pool: the adapters that there are to adapt from.
    """

    base: Base
    into: Library
    tasks: Mapping[str, Task]
    settings: AdaptSettings
    run: RunSettings
    display: Display
    pool: Pool

    @property
    def key(self) -> str:
        """A hash of all that decides the results of all tasks: what is kept while it runs is named by it."""
        hashes = {name: task.data_hash for name, task in sorted(self.tasks.items())}
        ways = [self.settings.name, self.run.window, self.run.precision_of(self.base.model)]
        # Running state knows adapters by their names, finished results by what they hold.
        pool = sorted(self.pool.hashes.items())
        document = [self._identity(), as_recorded(self.settings.train), hashes, ways, pool]
        return f"adapt-{state_key(document)}"

    def state(self, suffix: str) -> Path:
        """A file that lasts until the adaptation ends."""
        return self.into.path / BUILD_FOLDER / f"{self.key}{suffix}"

    @property
    def log_folder(self) -> Path:
        """Where metrics are written."""
        return self.into.path / LOGS

    def unit(self, task: str) -> ExpertSpec:
        """What becomes of a task, as builds know it."""
        s = self.settings
        return ExpertSpec(s.name_for(task), (task,), s.train, method=f"adapt-{s.method}")

    def job(self, task: str, **changes: Any) -> Job:
        """The rows of a task, encoded, with other fields of the job beside."""
        unit = self.unit(task)
        job = make_job(unit, self.tasks, template_for(self.base, unit.settings), changes.pop("targets", None))
        return replace(job, **changes)

    def base_loss(self, val: Sequence[Example]) -> float:
        """Loss of the bare base, nats per target token."""
        with narrowed(self.base.model.device, self.run.autocast):
            losses = answer_losses(self.base.model, val, max_tokens=self.run.fixed_tokens)
        return sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)

    def is_finished(self, task: str) -> bool:
        """Whether the result of a task is there, as this adaptation would make it.

        Raises:
            LibraryError: if another adapter has its name.
        """
        name = self.settings.name_for(task)
        if name not in self.into:
            return False
        tokenizer = content_of_tokenizer(self.base.tokenizer)
        other = other_build(self.into, self.unit(task), self.tasks, self.run.precision_of(self.base.model), tokenizer)
        recorded = self.into.provenance(name).get(ADAPTATION)
        identity = {**recorded_adaptation(AdaptSettings()), **(recorded or {})}
        expected = self._identity()
        if recorded is None:
            other = "no result of lorary adapt"
        elif identity != expected and other is None:
            keys = sorted(key for key in {*identity, *expected} if identity.get(key) != expected.get(key))
            other = ", ".join(f"other {key}: {identity.get(key)!r} instead of {expected.get(key)!r}" for key in keys)
        if other is not None:
            raise LibraryError(
                f"library '{self.into.path}' must have the name '{name}' free for this adaptation",
                found=other,
                remedy=f"--into another library, or --name, or: lorary library remove {self.into.path} {name}",
            )
        return True

    def commit(self, task: str, modules: Mapping[str, LoraFactors], outcome: Mapping[str, Any]) -> None:
        """Commit the result of a task, unless a run that was killed has done so just before.

        Args:
            task: its name.
            modules: factors by path.
            outcome: `parents` (content hash by name), `metrics`, and whatever else is to be recorded.
        """
        unit, s = self.unit(task), self.settings
        if unit.name in self.into:
            return
        parents: Mapping[str, str] = outcome["parents"]
        provenance = {
            **outcome,
            "method": unit.method,
            "tasks": [task],
            "families": {task: self.tasks[task].family},
            "data_hashes": {task: self.tasks[task].data_hash},
            "settings": as_recorded(s.train),
            ADAPTATION: self._identity(),
            "seed": s.train.seed,
            "template": s.train.template,
            "base_dtype": self.run.precision_of(self.base.model),
            **text_of(self.base.tokenizer, s.train.template),
            "parents": list(parents.values()),
            "parent_names": list(parents),
            "versions": {package: version(package) for package in ("lorary", "torch", "transformers")},
        }
        self.into.add_adapter(
            new_adapter(unit.name, modules, self.base.files.name, dropout=s.train.dropout),
            json.loads(json.dumps(provenance)),
        )

    def _identity(self) -> dict[str, Any]:
        """The settings, and a hash of the adapters that there were to adapt from."""
        return {**recorded_adaptation(self.settings), "pool": state_key(sorted(self.pool.hashes.values()))}
