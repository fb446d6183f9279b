"""`--method poly` and `mhr`: one model whose skills and assignment are learnt together."""

import json
from dataclasses import asdict

from lorary.build.jobs import ExpertSpec, make_job
from lorary.build.methods import PolySettings
from lorary.build.poly import commit_skills, is_finished, poly_stack, poly_unit
from lorary.build.poly_export import check_exports, export_mu, export_tasks
from lorary.build.progress import TrainingBar, opened_logs
from lorary.build.settings import BuildSettings
from lorary.build.shards import loop_settings, template_for
from lorary.build.state import build_key, checkpoint_path, close_build
from lorary.build.train_units import BuildContext
from lorary.train.loop import train_queue
from lorary.train.poly import skill_names
from lorary.train.units import TrainedUnit


def build_poly(
    context: BuildContext, settings: BuildSettings, poly: PolySettings, *, mu: bool = False, per_task: bool = False
) -> tuple[list[str], list[str]]:
    """Train one model of all tasks and commit its skills, its assignment and what is to be exported.

    Args:
        context: where; it is trained in this process, since it is one unit.
        settings: how to train.
        poly: skills and splits.
        mu: also commit the mean of the skills.
        per_task: also commit the mixture of every task.

    Returns:
        Names of the adapters committed by this run, and of those that were there.

    Raises:
        LibraryError: if the library holds a skill of another build, or a name to export under is taken.
        TrainError: if the training cannot go on.
    """
    assert context.base is not None
    unit = poly_unit(sorted(context.tasks), settings, poly)
    before = set(context.library.names())
    is_done = is_finished(context.library, unit, poly, context.tasks, context.base_dtype)
    check_exports(context.library, unit, poly, context.tasks, context.base_dtype, mu=mu, per_task=per_task)
    if is_done:
        context.display.say(f"the {poly.skills} skills are in the library already")
    else:
        _train(context, unit, poly)
    close_build(context.library.path, _key(context, unit, poly))
    names = list(skill_names(poly.skills))
    names += [export_mu(context.library)] if mu else []
    names += export_tasks(context.library) if per_task else []
    return [name for name in names if name not in before], [name for name in names if name in before]


def _train(context: BuildContext, unit: ExpertSpec, poly: PolySettings) -> None:
    base, library = context.base, context.library
    assert base is not None
    job = make_job(unit, context.tasks, template_for(base, unit.settings), None)
    checkpoint = checkpoint_path(library.path, _key(context, unit, poly), [job.name])

    def commit(trained: TrainedUnit) -> None:
        commit_skills(library, unit, poly, trained, context.tasks, base, context.run)

    with (
        context.display.bar(f"training {poly.skills} skills of {len(unit.tasks)} tasks", job.num_steps) as bar,
        opened_logs(context.run.logs, context.log_folder, "train") as logs,
    ):
        watch = TrainingBar(bar, {job.name: job.num_steps}, [])
        train_queue(
            base.model,
            [job],
            poly_stack(base, unit, poly),
            loop_settings(unit.settings, context.run),
            checkpoint=checkpoint,
            on_finish=commit,
            callbacks=[watch, *logs, *context.callbacks],
        )


def _key(context: BuildContext, unit: ExpertSpec, poly: PolySettings) -> str:
    return build_key([unit], context.tasks, 1, f"{context.requested_dtype} {json.dumps(asdict(poly))}")
