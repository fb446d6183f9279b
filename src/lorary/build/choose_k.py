"""How many clusters? The paper's way: build with each number, and keep the one with the lowest validation loss."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.build.experts import check_clusters, check_same_build
from lorary.build.jobs import ExpertSpec
from lorary.build.settings import as_recorded
from lorary.build.shards import template_for
from lorary.build.state import candidate_folder, remove_candidate
from lorary.build.train_units import BuildContext, train_units
from lorary.data.schema import Task
from lorary.evaluate.loglik import answer_losses
from lorary.library.derived import load_derived, save_derived
from lorary.library.files import encode_json
from lorary.library.layout import LIBRARY_FILE
from lorary.library.provenance import COMPUTED
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing

KIND, DOCUMENT = "choice_of_k", "table.json"


def choose_k(context: BuildContext, plans: Mapping[int, Sequence[ExpertSpec]]) -> list[dict[str, Any]]:
    """Build every plan beside the library, choose one, and put its experts into the library.

    Args:
        context: where.
        plans: the experts, by number of clusters.

    Returns:
        One row for each k: `k`, `val_loss` (mean over the tasks of each task's validation loss under its own expert,
        nats per target token) and `chosen`. The smallest k wins among equals.
    """
    path = context.library.path
    table = known_choice(path, plans, context.tasks, context.requested_dtype)
    if table is None:
        check_clusters(context.library, [], context.tasks, context.base_dtype)
        table = _table(context, plans)
        key = _key(plans, context.tasks, context.requested_dtype)
        save_derived(path, KIND, key, {DOCUMENT: encode_json({"table": table})})
    chosen = next(row["k"] for row in table if row["chosen"])
    check_clusters(context.library, plans[chosen], context.tasks, context.base_dtype)
    _take_over(context, plans[chosen], _folder(context, chosen, plans[chosen]))
    for k, units in plans.items():
        remove_candidate(_folder(context, k, units))
    return table


def known_choice(
    library: Path, plans: Mapping[int, Sequence[ExpertSpec]], tasks: Mapping[str, Task], dtype: str
) -> list[dict[str, Any]] | None:
    """The table of `choose_k` as the library has recorded it; None where nothing was chosen yet.

    Args:
        library: folder of the library; it need not be there.
        plans: the experts, by number of clusters.
        tasks: all tasks, by name.
        dtype: `BuildContext.requested_dtype` of the build.
    """
    stored = load_derived(library, KIND, _key(plans, tasks, dtype))
    return None if stored is None else list(json.loads(stored[DOCUMENT])["table"])


def _key(plans: Mapping[int, Sequence[ExpertSpec]], tasks: Mapping[str, Task], dtype: str) -> dict[str, Any]:
    return {
        "plans": {str(k): [[u.name, list(u.tasks), as_recorded(u.settings)] for u in plans[k]] for k in sorted(plans)},
        "data": {name: task.data_hash for name, task in tasks.items()},
        "dtype": dtype,
    }


def _table(context: BuildContext, plans: Mapping[int, Sequence[ExpertSpec]]) -> list[dict[str, Any]]:
    losses = {}
    for k, units in sorted(plans.items()):
        context.display.say(f"candidate: {k} clusters")
        path = _folder(context, k, units)
        library = Library.open(path) if (path / LIBRARY_FILE).exists() else _create(context, path)
        with library.build_lock():
            # Metrics outlive the candidates.
            train_units(replace(context, library=library, logs=context.log_folder / f"k-{k}"), units)
        losses[k] = mean_task_loss(context, library, units)
    best = min(losses, key=lambda k: (losses[k], k))
    return [{"k": k, "val_loss": loss, "chosen": k == best} for k, loss in losses.items()]


def _folder(context: BuildContext, k: int, units: Sequence[ExpertSpec]) -> Path:
    return candidate_folder(context.library.path, k, units, context.tasks, context.requested_dtype)


def _create(context: BuildContext, path: Path) -> Library:
    assert context.base is not None
    return Library.create(path, context.base.model, base_name=context.library.base.name)


def mean_task_loss(context: BuildContext, library: Library, units: Sequence[ExpertSpec]) -> float:
    """Mean over tasks of the validation loss of each task under its own expert, nats per target token.

    Args:
        context: base and tasks.
        library: holds the experts.
        units: which expert has which tasks.
    """
    assert context.base is not None
    model, losses = context.base.model, []
    # The router is never asked: every pass below names its expert.
    attach(model, library, router="uniform")
    try:
        for unit in units:
            template = template_for(context.base, unit.settings)
            for name in unit.tasks:
                rows = context.tasks[name].split("val")[: unit.settings.val_rows]
                with routing(model, {"experts": [unit.name]}):
                    answers = answer_losses(model, [template.encode(row.prompt, row.target) for row in rows])
                losses.append(sum(a.total for a in answers) / sum(a.num_tokens for a in answers))
    finally:
        detach(model)
    return sum(losses) / len(losses)


def _take_over(context: BuildContext, units: Sequence[ExpertSpec], folder: Path) -> None:
    """Commit the chosen experts, which were trained beside the library; any that are gone are trained again later."""
    names = set(context.library.names())
    missing = [unit for unit in units if unit.name not in names]
    if not missing or not (folder / LIBRARY_FILE).exists():
        return
    library = Library.open(folder)
    built = set(library.names())
    missing = [unit for unit in missing if unit.name in built]
    check_same_build(library, missing, context.tasks, context.base_dtype)
    for unit in missing:
        provenance = {key: value for key, value in library.provenance(unit.name).items() if key not in COMPUTED}
        context.library.add_adapter(library.get(unit.name), provenance)
