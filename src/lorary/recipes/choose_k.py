"""How many clusters? The paper's way: build with each number, and keep the one with the lowest validation loss."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorary.evaluate.loglik import answer_losses
from lorary.library.derived import load_derived, save_derived
from lorary.library.files import encode_json
from lorary.library.provenance import COMPUTED
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.recipes.build_settings import as_recorded
from lorary.recipes.jobs import Unit
from lorary.recipes.open import BUILD_FOLDER
from lorary.recipes.workshop import Workshop, template_for, train_units

KIND, DOCUMENT = "choice_of_k", "table.json"


def choose_k(shop: Workshop, plans: Mapping[int, Sequence[Unit]]) -> list[dict[str, Any]]:
    """Build every plan beside the library, choose one, and put its experts into the library.

    Args:
        shop: where.
        plans: the experts, by number of clusters.

    Returns:
        One row for each k: `k`, `val_loss` (mean over the tasks of each task's validation loss under its own expert,
        nats per target token) and `chosen`. The smallest k wins among equals.
    """
    key = {
        "plans": {str(k): [[u.name, list(u.tasks), as_recorded(u.settings)] for u in plans[k]] for k in sorted(plans)},
        "data": {name: task.data_hash for name, task in shop.tasks.items()},
        "dtype": shop.run.dtype if shop.base is None else str(shop.base.model.dtype),
    }
    stored = load_derived(shop.library.path, KIND, key)
    if stored is None:
        table = _table(shop, plans)
        save_derived(shop.library.path, KIND, key, {DOCUMENT: encode_json({"table": table})})
    else:
        table = json.loads(stored[DOCUMENT])["table"]
    chosen = next(row["k"] for row in table if row["chosen"])
    _take_over(shop, plans[chosen], _folder(shop, chosen))
    for k in plans:
        shutil.rmtree(_folder(shop, k), ignore_errors=True)
    return list(table)


def _table(shop: Workshop, plans: Mapping[int, Sequence[Unit]]) -> list[dict[str, Any]]:
    losses = {}
    for k, units in sorted(plans.items()):
        shop.display.say(f"candidate: {k} clusters")
        path = _folder(shop, k)
        library = Library.open(path) if path.exists() else _create(shop, path)
        with library.build_lock():
            train_units(replace(shop, library=library), units)
        losses[k] = mean_task_loss(shop, library, units)
    best = min(losses, key=lambda k: (losses[k], k))
    return [{"k": k, "val_loss": loss, "chosen": k == best} for k, loss in losses.items()]


def _folder(shop: Workshop, k: int) -> Path:
    return shop.library.path / BUILD_FOLDER / f"k-{k}"


def _create(shop: Workshop, path: Path) -> Library:
    assert shop.base is not None
    return Library.create(path, shop.base.model, base_name=shop.library.base.name)


def mean_task_loss(shop: Workshop, library: Library, units: Sequence[Unit]) -> float:
    """Mean over tasks of the validation loss of each task under its own expert, nats per target token.

    Args:
        shop: base and tasks.
        library: holds the experts.
        units: which expert has which tasks.
    """
    assert shop.base is not None
    model, losses = shop.base.model, []
    # The router is never asked: every pass below names its expert.
    attach(model, library, router="uniform")
    try:
        for unit in units:
            template = template_for(shop.base, unit.settings)
            for name in unit.tasks:
                rows = shop.tasks[name].split("val")[: unit.settings.val_rows]
                with routing(model, {"experts": [unit.name]}):
                    answers = answer_losses(model, [template.encode(row.source, row.target) for row in rows])
                losses.append(sum(a.total for a in answers) / sum(a.num_tokens for a in answers))
    finally:
        detach(model)
    return sum(losses) / len(losses)


def _take_over(shop: Workshop, units: Sequence[Unit], folder: Path) -> None:
    """Commit the chosen experts, which were trained beside the library; any that are gone are trained again later."""
    if not folder.exists():
        return
    library = Library.open(folder)
    for unit in units:
        if unit.name in library and unit.name not in shop.library:
            told = {key: value for key, value in library.provenance(unit.name).items() if key not in COMPUTED}
            shop.library.add_adapter(library.get(unit.name), told)
