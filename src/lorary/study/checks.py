"""What a study must be beside well-formed: names tell things apart, and what is named is there by then."""

from collections.abc import Mapping

from lorary.data.schema import SPLITS as ROWS
from lorary.errors import UsageError
from lorary.study.config import AdaptStage, EvaluateStage, Study, identity
from lorary.study.values import check_keys, is_positive


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
    known = ("tasks", "rows", *(f"{split}_rows" for split in ROWS), "tokens")
    for number, chosen in enumerate((study.train, *study.held_out)):
        where = "tasks.train, assume," if number == 0 else f"tasks.held_out[{number - 1}], assume,"
        told = check_keys(chosen.assume, known, where)
        if wrong := [key for key, value in told.items() if not is_positive(value)]:
            raise UsageError(f"{where} key '{wrong[0]}' must be a number above 0", found=repr(told[wrong[0]])[:80])
        has_rows = "rows" in told or all(f"{split}_rows" in told for split in ROWS)
        if told and not (has_rows and "tokens" in told and ("tasks" in told or chosen.names)):
            raise UsageError(
                f"{where} must say rows, tokens and, without names, tasks", found=f"keys {', '.join(told)}"
            )
    if wrong := [key for key in ("dtype_bytes", "tflops") if not is_positive(study.assume.get(key, 1))]:
        raise UsageError(f"assume, key '{wrong[0]}' must be a number above 0", found=repr(study.assume[wrong[0]])[:80])
    if not isinstance(study.assume.get("model", {}), Mapping):
        raise UsageError("assume, key 'model' must be a mapping", found=repr(study.assume["model"])[:80])


def _check_cells(study: Study) -> None:
    """Refuse two stages that mean different things by one cell."""
    seen: dict[str, EvaluateStage] = {}
    for stage in study.stages:
        cells = (
            [f"{library}/{router}" for library in stage.libraries for router in stage.routers]
            if isinstance(stage, EvaluateStage)
            else []
        )
        for cell in cells:
            assert isinstance(stage, EvaluateStage)
            other = seen.setdefault(cell, stage)
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
        own = identity(stage)
        if own in before:
            raise UsageError("a stage must have a name of its own", found=f"{own}, twice", remedy="rename one")
        if missing := [name for name in stage.needs if name not in before]:
            raise UsageError(f"{own} must name libraries that an earlier stage builds", found=missing[0].split(":")[1],
                             remedy=f"there are, by then, {sorted(before) or 'none'}")  # fmt: skip
        before.add(own)
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
