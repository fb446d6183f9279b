"""What a study must be beside well-formed: names tell things apart, and what is named is there by then."""

from lorary.data.schema import SPLITS
from lorary.errors import UsageError
from lorary.study.config import AdaptStage, EvaluateStage, Study, identity


def check_study(study: Study) -> None:
    """Refuse a study whose names do not hold together.

    Raises:
        UsageError: if held-out sets share a name, or a stage or a question names what is not there by then.
    """
    _check_sets(study)
    _check_assumed(study)
    _check_references(study)
    _check_cells(study)


def _check_sets(study: Study) -> None:
    """Refuse names that tell no sets apart."""
    if study.train.name is not None:
        raise UsageError("tasks.train must have no name: held-out sets alone are told apart", found=study.train.name)
    names = [chosen.name for chosen in study.held_out if chosen.name is not None]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(
            "a held-out set must have a name of its own", found=f"'{twice[0]}', twice", remedy="rename one"
        )
    if empty := [name for name in names if not name.strip()]:
        raise UsageError("a held-out set's name must say something", found=repr(empty[0]))


def _check_assumed(study: Study) -> None:
    """Refuse what a dry run could not count with."""
    for number, chosen in enumerate((study.train, *study.held_out)):
        where = "tasks.train" if number == 0 else f"tasks.held_out[{number - 1}]"
        assumed = chosen.assume
        has_rows = "rows" in assumed or all(f"{split}_rows" in assumed for split in SPLITS)
        if assumed and not (has_rows and "tokens" in assumed and ("tasks" in assumed or chosen.names)):
            raise UsageError(
                f"{where}, assume, must say rows, tokens and, without names, tasks",
                found=f"keys {', '.join(assumed)}",
            )


def _check_cells(study: Study) -> None:
    """Refuse two stages that mean different things by one cell."""
    first_stage: dict[str, EvaluateStage] = {}
    for stage in study.stages:
        cells = (
            [f"{library}/{router}" for library in stage.libraries for router in stage.routers]
            if isinstance(stage, EvaluateStage)
            else []
        )
        for cell in cells:
            assert isinstance(stage, EvaluateStage)
            other = first_stage.setdefault(cell, stage)
            if dict(other.settings) != dict(stage.settings):
                raise UsageError(
                    f"cell {cell} must mean one thing in a study",
                    found=f"other settings in evaluate:{other.name} than in evaluate:{stage.name}",
                    remedy="write what differs into the router's brackets: arrow[top_k=1]",
                )


def _check_references(study: Study) -> None:
    """Refuse a stage or a question that names what is not there, or comes later."""
    before: set[str] = set()
    for stage in study.stages:
        name = identity(stage)
        if name in before:
            raise UsageError("a stage must have a name of its own", found=f"{name}, twice", remedy="rename one")
        if missing := [needed for needed in stage.needs if needed not in before]:
            raise UsageError(f"{name} must name libraries that an earlier stage builds", found=missing[0].split(":")[1],
                             remedy=f"there are, by then, {sorted(before) or 'none'}")  # fmt: skip
        before.add(name)
    columns = {f"{library}/{router}" for stage in study.stages if isinstance(stage, EvaluateStage)
               for library in stage.libraries for router in ("base", *stage.routers)}  # fmt: skip
    columns |= {f"{stage.name}/{method}" for stage in study.stages if isinstance(stage, AdaptStage)
                for method in ("base", *stage.methods)}  # fmt: skip
    for question in study.questions:
        if question.drift is not None and f"drift:{question.drift}" not in before:
            raise UsageError(f"question '{question.ask}' must name a drift stage", found=question.drift)
        cells = [*question.cells, *(cell for pair in question.comparisons() for cell in pair), question.share_of]
        if unknown := [cell for cell in cells if cell is not None and cell not in columns]:
            raise UsageError(f"question '{question.ask}' must name cells that some stage scores", found=unknown[0],
                             remedy=f"there are {', '.join(sorted(columns))}")  # fmt: skip
