"""`lorary evaluate --harness`: tasks of lm-evaluation-harness on a library under several routers, beside the base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.display import Display
from lorary.errors import LibraryError, UsageError
from lorary.evaluate.harness import load_tasks
from lorary.evaluate.harness_cells import HarnessResult, choose_primary
from lorary.evaluate.harness_library import HarnessRun, harness_settings, quiet_harness
from lorary.evaluate.settings import HarnessSettings
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import load_base
from lorary.recipes.base_options import BaseOptions


def run_harness(
    library_path: str,
    names: Sequence[str],
    *,
    routers: Sequence[str],
    settings: HarnessSettings | None = None,
    template: str | None = None,
    route: Mapping[str, Any] | None = None,
    load: BaseOptions | None = None,
) -> HarnessResult:
    """Load a library, its base and tasks of the harness, and evaluate; answers that are there are not computed again.

    Args:
        library_path: folder of the library.
        names: of tasks, groups or tags of the harness.
        routers: names of routers; `base` is always among them, and an oracle cannot be.
        settings: rows and shots.
        template: `plain` (the task's prompts as they are) or `chat` (in the base's chat template); must be the one the
            experts were trained with.
        route: fields of `Routing`, in place of those of the library's default router.
        load: the base model; the library's own where None.

    Returns:
        The cells.

    Raises:
        UsageError: if no task is named, or a number is out of range.
        LibraryError: if the library is empty, or its experts were trained with another template.
        TaskError: if a task is unknown, does not load, or runs code that a model wrote.
    """
    display, settings, load = Display(), settings or HarnessSettings(), load or BaseOptions()
    _check(names, settings)
    library = Library.open(library_path)
    if not library.names():
        raise LibraryError(f"library '{library.path}' must hold an adapter to be evaluated", found="none")
    evaluation = harness_settings(library, routers, route or {}, display)
    chat = template_of(library, template) == "chat"
    with quiet_harness():
        tasks = load_tasks(names, settings.harness_path)
        loaded = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
        run = HarnessRun(loaded, library, evaluation, tasks, display, settings.rows, settings.shots, chat)
        attach(
            loaded.model, library, router="base", tokenizer=loaded.tokenizer, template="chat" if chat else "plain",
            force_base=load.force_base,
        )  # fmt: skip
        try:
            cells = choose_primary([cell for router in evaluation.routers for cell in run.cells(router)])
        finally:
            detach(loaded.model)
    recorded = {
        "tasks": list(names),
        "rows": settings.rows,
        "shots": settings.shots,
        "template": "chat" if chat else "plain",
    }
    routed = {router: evaluation.setting(router).to_json() for router in evaluation.routers}
    return HarnessResult(cells, library.name, loaded.files.name, {**recorded, "routers": routed})


def _check(names: Sequence[str], settings: HarnessSettings) -> None:
    if not names:
        raise UsageError("tasks of the harness must be named", found="none", remedy="for example arc_easy,piqa")
    if settings.harness_path is not None and not Path(settings.harness_path).is_dir():
        raise UsageError("--harness-path must be a folder of tasks", found=settings.harness_path)
