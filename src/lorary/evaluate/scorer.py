"""Scoring one library, cell by cell: what was scored before is read, what cannot be scored is said and left."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from lorary.data.schema import Row, Task
from lorary.data.template import Template, make_template
from lorary.errors import LoraryError, TaskError
from lorary.evaluate.answers import RowScores, score_rows
from lorary.evaluate.base_template import BaseTemplate, template_rows
from lorary.evaluate.cache import ResultCache
from lorary.evaluate.cells import BASE, Cell, CellFailure
from lorary.evaluate.cost import measured
from lorary.evaluate.decisions import asks_base, decide, decides_once
from lorary.evaluate.evaluation import ExpertLosses, ScoredCells
from lorary.evaluate.finite import finite_logits
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.metrics import find_metric
from lorary.evaluate.metrics.choice import ACC, ACC_RAW
from lorary.evaluate.metrics.metric import Metric
from lorary.evaluate.metrics.perplexity import perplexity
from lorary.evaluate.recorded_tasks import experts_by_task
from lorary.evaluate.references import SEED, Look, best_single, drawn_anew, reference_rows
from lorary.evaluate.routing_accuracy import RoutingAccuracy, RoutingUsage, decides, look_at_routing
from lorary.evaluate.sandbox import Sandbox
from lorary.evaluate.seated_base import SeatedBase
from lorary.evaluate.settings import EvaluateSettings
from lorary.evaluate.statistics import bootstrap_interval
from lorary.model.attach import routing
from lorary.model.base import Base
from lorary.model.prepared import prepared_marks
from lorary.model.seating import seating
from lorary.ops.memory import is_out_of_memory
from lorary.route.setting import CHAT, Routing
from lorary.route.spec import BEST_SINGLE, ORACLE_OR_BASE, RANDOM, REFERENCES


class _CellError(Exception):
    """A cell could not be scored."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Scorer:
    """Scores the routers of one library.

    Args:
        seated: the base with the library's experts seated.
        name: what the cells call the library.
        settings: how to evaluate.
        others: results of other libraries over the same base, where the base may have been scored already.
        sandbox: where generated programs are run; None where they may not be.
        tasks: all that are scored, over which the best single expert is chosen.
    """

    def __init__(
        self,
        seated: SeatedBase,
        name: str,
        settings: EvaluateSettings,
        other_caches: Sequence[ResultCache],
        sandbox: Sandbox | None = None,
        tasks: Iterable[Task] = (),
    ) -> None:
        self._seated, self._name, self._settings, self._other_caches = seated, name, settings, other_caches
        self._sandbox, self._tasks = sandbox, list(tasks)
        self._single: str | None = None
        self._cache = seated.cache
        self._expert_of_task = experts_by_task(seated.library.describe())

    def score(self, task: Task, router: str, scored: ScoredCells) -> CellFailure | None:
        """Score one router on one task, and look at its routing.

        Args:
            task: with test rows.
            router: as it is written.
            scored: gets the cells; or, where they cannot be scored, the failure.

        Returns:
            The failure, if it is one.
        """
        try:
            scored.cells += (
                self._base_cells(task, scored) if router == BASE else self._router_cells(task, router, scored)
            )
        except _CellError as error:
            failure = _failure(error.cause, self._name, router, task.name)
            scored.failures.append(failure)
            return failure
        try:
            self._look(task, router, scored)
        except _CellError as error:  # no failure: the cell has its score
            reason = _reason(_failure(error.cause, self._name, router, task.name))
            message = f"{self._name}, {router}, {task.name}: scored, but its routing could not be looked at: {reason}"
            warnings.warn(message, stacklevel=2)
        return None

    def _base_cells(self, task: Task, scored: ScoredCells) -> list[Cell]:
        """The base under both templates, or the only one that can be scored; all might count.

        Which does, follows once the rows of all tasks were looked at (`base_template.count_templates`).
        """
        templates = self._base_templates()
        runs, failed = dict[str, list[Cell]](), dict[str, _CellError]()
        for template in templates:
            try:
                runs[template] = self._cells(task, BASE, Routing(BASE), template)
            except _CellError as error:
                failed[template] = error
        if not runs:
            raise failed[templates[0]]
        for template, failure in failed.items():
            self._warn(failure, task, f"task '{task.name}': the base is left out in the template {template}")
        if len(runs) > 1:
            scored.base_templates.append(self._base_template(task, list(runs)))
        return [cell for run in runs.values() for cell in run]

    def _base_template(self, task: Task, templates: Sequence[str]) -> BaseTemplate:
        """How the base does in each template on rows of the task that are not reported."""
        split, rows = template_rows(task, self._settings.template_rows)
        looks = dict[str, Look]()
        for template in templates if rows else ():
            try:
                looks[template] = self._look_at_rows(task, split, rows, Routing(BASE), template)
            except _CellError as error:
                rule = f"task '{task.name}': the base's template {template} is not tried on {split} rows"
                self._warn(error, task, rule)
        scores, losses = ({name: getattr(look, of) for name, look in looks.items()} for of in Look._fields)
        return BaseTemplate(task.name, split, len(rows), scores, losses)

    def _warn(self, error: _CellError, task: Task, rule: str) -> None:
        reason = _reason(_failure(error.cause, self._name, BASE, task.name))
        warnings.warn(f"{rule}: {reason}", stacklevel=3)

    def _router_cells(self, task: Task, router: str, scored: ScoredCells) -> list[Cell]:
        s = self._settings
        if router not in REFERENCES:
            return self._cells(task, router, s.setting(router), s.template)
        if router == BEST_SINGLE:
            expert = self._best_single()
            return self._cells(task, router, Routing(experts=[expert]), s.template, expert)
        own = self._expert_of_task.get(task.name)
        expert = own or self._oracle_expert(task, scored)
        if router == ORACLE_OR_BASE and own is None and (template := self._better_base(task, expert)) is not None:
            return self._cells(task, router, Routing(BASE), template, BASE)
        return self._cells(task, router, Routing(experts=[expert]), s.template, expert)

    def _oracle_expert(self, task: Task, scored: ScoredCells) -> str:
        """The expert of the lowest loss on a held-out task."""
        alone = self._expert_losses(task)
        if alone not in scored.expert_losses:
            scored.expert_losses.append(alone)
        return best_single([alone.losses])

    def _best_single(self) -> str:
        if self._single is None:
            self._single = best_single([self._expert_losses(task).losses for task in self._tasks])
        return self._single

    def _better_base(self, task: Task, expert: str) -> str | None:
        """The template in which the base does better than an expert on the oracle's rows; None where it does not."""
        split, rows = reference_rows(task, self._settings.oracle_rows)
        asked = [(Routing(experts=[expert]), self._settings.template)]
        asked += [(Routing(BASE), template) for template in self._base_templates()]
        looks = [self._look_at_rows(task, split, rows, *how) for how in asked]
        best = max(range(len(asked)), key=lambda i: (looks[i].score, -looks[i].loss, -i))
        return asked[best][1] if best else None

    def _base_templates(self) -> list[str]:
        """Those under which the base is scored."""
        own = [CHAT] if self._seated.chat_prompt and self._settings.template != CHAT else []
        return [self._settings.template, *own]

    def _look_at_rows(self, task: Task, split: str, rows: Sequence[Row], setting: Routing, template: str) -> Look:
        """Score and loss on rows of a task that are not reported."""
        metric, is_base = self._metric(task), setting == Routing(BASE)
        key = self._cache.key(
            look=task.name, data=task.data_hash, split=split, rows=len(rows), metric=metric.name, template=template,
            routing=setting.to_json(), with_experts=not is_base, **self._conditions(template),
            **metric.judge(self._sandbox),
        )  # fmt: skip

        def look(base: Base) -> list[float]:
            with routing(base.model, setting), finite_logits(base.model):
                scores, _ = self._score_rows(base, self._template(base, template), rows, metric)
            _check_finite(scores, task.name)
            return [fmean(scores.score), fmean(scores.loss)]

        return Look(*self._remembered(key, look, self._other_caches if is_base else ()))

    def _cells(self, task: Task, router: str, setting: Routing, template: str, expert: str | None = None) -> list[Cell]:
        s = self._settings
        metric, is_base = self._metric(task), setting == Routing(BASE)
        key = self._cache.key(
            task=task.name, data=task.data_hash, rows=s.rows, metric=metric.name, template=template,
            routing=setting.to_json(), with_experts=not is_base,
            **{**self._conditions(template), **(self._conditions(CHAT) if setting.fallback == CHAT else {})},
            **self._prepared(setting), **metric.judge(self._sandbox), **({RANDOM: SEED} if router == RANDOM else {}),
        )  # fmt: skip

        def make(base: Base) -> list[dict[str, Any]]:
            with drawn_anew(base.model, expert) if router == RANDOM and expert else nullcontext():
                return [asdict(cell) for cell in self._score(base, task, router, setting, template, metric)]

        cells = self._remembered(key, make, self._other_caches if is_base else ())
        # What names the cell and is no part of its value may have changed since it was scored.
        labels = {
            "library": self._name, "router": router, "expert": expert, "family": task.family, "data": task.data_hash,
            "split": "held_in" if task.name in self._expert_of_task else "held_out",
        }  # fmt: skip
        return [Cell(**{**cell, **labels}) for cell in cells]

    def _remembered(self, key: str, make: Callable[[Base], Any], other_caches: Sequence[ResultCache] = ()) -> Any:
        """A value that was computed before, here or beside another library; else it is made, and kept here.

        What goes wrong while it is made concerns this cell alone; what goes wrong around it (another base than the
        library's, a full disk) concerns all.
        """
        value = self._cache.get(key)
        if value is not None:
            return value
        value = next((value for cache in other_caches if (value := cache.get(key)) is not None), None)
        if value is None:
            base = self._seated.loaded()
            try:
                value = make(base)
            except (LoraryError, MemoryError, RuntimeError) as error:
                if not isinstance(error, LoraryError) and not is_out_of_memory(error):
                    raise
                raise _CellError(error) from error
        self._cache.put(key, value)
        return value

    def _score(
        self, base: Base, task: Task, router: str, setting: Routing, template: str, metric: Metric
    ) -> list[Cell]:
        rows = task.split("test")[: self._settings.rows]
        if not rows:
            raise TaskError(f"task '{task.name}' must have test rows to be evaluated on", found="none")
        with routing(base.model, setting), finite_logits(base.model), measured(base.model.device) as cost:
            prompt_template = self._template(base, template)
            scores, num_asked = self._score_rows(base, prompt_template, rows, metric)
        _check_finite(scores, task.name)
        cells = []
        for name, values, primary in (("loss", scores.loss, False), (scores.metric, scores.score, True)):
            low, high = bootstrap_interval(values, task=task.name)
            cells.append(
                Cell(
                    library=self._name,
                    router=router,
                    task=task.name,
                    family=task.family,
                    split="",
                    metric=name,
                    primary=primary,
                    value=sum(values) / len(values),
                    low=low,
                    high=high,
                    n=len(values),
                    seconds=cost.seconds,
                    template=template,
                    prefix=prompt_template.prefix,
                    peak_bytes=cost.peak_bytes,
                    values=values,
                    base_rows=num_asked,
                )
            )
        loss, scored = cells
        value, low, high = map(perplexity, (loss.value, loss.low, loss.high))
        of_rows = [perplexity(nats) for nats in loss.values]
        perplexities = replace(loss, metric="perplexity", value=value, low=low, high=high, values=of_rows)
        return [loss, perplexities, replace(scored, answers=scores.answers)]

    def _score_rows(self, base: Base, template: Template, rows: Sequence[Row], metric: Metric) -> tuple[RowScores, int]:
        """Scores under the router in force, and how many rows it gave to the base in its own chat template.

        A router for whole requests decides once per row; rows that were decided alike are scored together.
        """

        def scored(part: Sequence[Row], asked: Template) -> RowScores:
            return score_rows(base.model, base.tokenizer, asked, part, metric, sandbox=self._sandbox, among=rows)

        if not decides_once(base.model):
            return scored(rows, template), 0
        decided = decide(base.model, [template.encode_prompt(row.prompt) for row in rows])
        router, chat = seating(base.model).routing, self._own_template(base, template)
        groups: dict[Any, list[int]] = {}
        for i, decision in enumerate(decided):
            is_asked = chat is not None and not rows[i].options and asks_base(router, decision)
            groups.setdefault(CHAT if is_asked else decision.weights, []).append(i)
        by_row: dict[int, tuple[float, float, str]] = {}
        name = ""
        for weights, members in groups.items():
            is_asked = weights == CHAT
            with routing(base.model, Routing(BASE) if is_asked else decided[members[0]].setting(router)):
                part = scored([rows[i] for i in members], chat if is_asked and chat else template)
            name = part.metric
            by_row.update(zip(members, zip(part.loss, part.score, part.answers, strict=True), strict=True))
        losses, scores, answers = (list(column) for column in zip(*(by_row[i] for i in range(len(rows))), strict=True))
        return RowScores(losses, name, scores, answers), len(groups.get(CHAT, ()))

    def _own_template(self, base: Base, template: Template) -> Template | None:
        """The base's chat template, where it has one."""
        if template.name == CHAT:
            return template
        return self._template(base, CHAT) if self._seated.chat_prompt else None

    def _expert_losses(self, task: Task) -> ExpertLosses:
        """The mean loss of each expert alone on a task that has no expert of its own.

        On its validation rows, else its training rows; a task that has test rows only is judged on those, which an
        oracle may see.
        """
        split, rows = reference_rows(task, self._settings.oracle_rows)
        key = self._cache.key(
            expert_losses=task.name, data=task.data_hash, rows=len(rows), template=self._settings.template,
            **self._conditions(self._settings.template),
        )  # fmt: skip

        def measure(base: Base) -> dict[str, float]:
            template = self._template(base, self._settings.template)
            examples = [template.encode(row.prompt, row.target) for row in rows]
            losses = {}
            for name in self._seated.library.names():
                with routing(base.model, Routing(experts=[name])), finite_logits(base.model):
                    losses[name] = sum(loss.mean for loss in answer_losses(base.model, examples)) / len(examples)
            return losses

        return ExpertLosses(self._name, task.name, split, len(rows), self._remembered(key, measure))

    def _look(self, task: Task, router: str, scored: ScoredCells) -> None:
        """Where a router that chooses sends prompts of the task, and how much of it to the task's own expert."""
        s, expert = self._settings, self._expert_of_task.get(task.name)
        rows = task.split("test")[: s.routing_rows]
        if router in (BASE, *REFERENCES) or not rows:
            return
        setting = s.setting(router)
        key = self._cache.key(
            routed=task.name, data=task.data_hash, rows=len(rows), template=s.template, expert=expert,
            routing=setting.to_json(), **self._conditions(s.template), **self._prepared(setting),
        )  # fmt: skip

        def look(base: Base) -> dict[str, Any]:
            template = self._template(base, s.template)
            prompts = [template.encode_prompt(row.prompt) for row in rows]
            with routing(base.model, setting):
                return look_at_routing(base.model, prompts, expert)._asdict() if decides(base.model) else {}

        if not (seen := self._remembered(key, look)):
            return
        strongest = [(name, share) for name, share in seen["strongest"]]
        scored.routing_usage.append(RoutingUsage(self._name, router, task.name, seen["usage"], strongest))
        if expert is not None and seen["accuracy"]:
            share, top1, chance = seen["accuracy"]
            where = (self._name, router, task.name, task.family, expert)
            scored.routing.append(RoutingAccuracy(*where, share, top1, chance, len(rows)))

    def _conditions(self, template: str) -> dict[str, Any]:
        """What decides a score beside experts, task and router; a chat template may write another prompt each day."""
        conditions = {
            "max_length": self._settings.max_length,
            "device": self._seated.device,
            "dtype": self._seated.dtype,
        }
        return {**conditions, "prompt": self._seated.chat_prompt} if template == "chat" else conditions

    def _prepared(self, setting: Routing) -> dict[str, Any]:
        """What the router read beyond weights, and its rule's edition: with others, it scores anew."""
        marks = {"prepared": prepared_marks(setting, self._seated.library), "editions": setting.editions}
        return {name: mark for name, mark in marks.items() if mark}

    def _metric(self, task: Task) -> Metric:
        try:
            metric = find_metric(task.metric, task.name)
        except TaskError as error:
            raise _CellError(error) from error
        return ACC_RAW if self._settings.raw and metric is ACC else metric

    def _template(self, base: Base, name: str) -> Template:
        return make_template(name, base.tokenizer, max_length=base.most_tokens(self._settings.max_length))


def _check_finite(scores: RowScores, task: str) -> None:
    """Refuse what no mean could be taken of."""
    bad = [value for value in (*scores.loss, *scores.score) if not abs(value) < float("inf")]
    if bad:
        raise TaskError(
            f"the scores of task '{task}' must be finite numbers",
            found=f"{len(bad)} that are not, {bad[0]} among them",
            remedy="another --dtype",
        )


def _failure(error: Exception, library: str, router: str, task: str) -> CellFailure:
    if isinstance(error, LoraryError):
        return CellFailure(library, router, task, error.rule, error.found, error.remedy)
    message = (str(error).splitlines() or [type(error).__name__])[0]
    return CellFailure(library, router, task, "the work must fit the device's memory", message)


def _reason(failure: CellFailure) -> str:
    return failure.rule + (f" (found: {failure.found})" if failure.found else "")
