"""`lorary evaluate --harness`: tasks of lm-evaluation-harness on a library under several routers, beside the base."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorary.display import Display
from lorary.errors import LibraryError, UsageError
from lorary.evaluate.harness import load_tasks
from lorary.evaluate.harness_cells import choose_primary
from lorary.evaluate.harness_library import HarnessResult, HarnessRun, harness_settings, quiet_harness
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import load_base
from lorary.numbers import check_count


def run_harness(
    library_path: str,
    names: Sequence[str],
    *,
    routers: Sequence[str],
    include_path: str | None = None,
    rows: int | None = None,
    shots: int | None = None,
    template: str | None = None,
    route: Mapping[str, Any] | None = None,
    base: str | None = None,
    force_base: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    display: Display | None = None,
) -> HarnessResult:
    """Load a library, its base and tasks of the harness, and evaluate; answers that are there are not computed again.

    Args:
        library_path: folder of the library.
        names: of tasks, groups or tags of the harness.
        routers: names of routers; `base` is always among them, and an oracle cannot be.
        include_path: folder of tasks that the harness does not bring itself.
        rows: the first so many of each task; all where None.
        shots: examples in each prompt; the task's own number where None.
        template: `plain` (the task's prompts as they are) or `chat` (in the base's chat template); must be the one the
            experts were trained with.
        route: fields of `Routing`, in place of those of the library's default router.
        base: the base model to load; the library's own where None.
        force_base: accept unrelated weights of the same shapes.
        device: where to run.
        dtype: of the base.
        display: where progress is shown.

    Returns:
        The cells.

    Raises:
        UsageError: if no task is named, or a number is out of range.
        LibraryError: if the library is empty, or its experts were trained with another template.
        TaskError: if a task is unknown, does not load, or runs code that a model wrote.
    """
    display = display or Display()
    _check(names, include_path, rows, shots)
    library = Library.open(library_path)
    if not library.names():
        raise LibraryError(f"library '{library.path}' must hold an adapter to be evaluated", found="none")
    settings = harness_settings(library, routers, route or {}, display)
    chat = template_of(library, template) == "chat"
    with quiet_harness():
        tasks = load_tasks(names, include_path)
        loaded = load_base(base_of(library, base), dtype=dtype, device=device)
        run = HarnessRun(loaded, library, settings, tasks, display, rows, shots, chat)
        attach(loaded.model, library, router="base", tokenizer=loaded.tokenizer, force_base=force_base)
        try:
            cells = choose_primary([cell for router in settings.routers for cell in run.cells(router)])
        finally:
            detach(loaded.model)
    asked = {"tasks": list(names), "rows": rows, "shots": shots, "template": "chat" if chat else "plain"}
    routed = {router: settings.setting(router).to_json() for router in settings.routers}
    return HarnessResult(cells, library.name, loaded.files.name, {**asked, "routers": routed})


def _check(names: Sequence[str], include_path: str | None, rows: int | None, shots: int | None) -> None:
    if not names:
        raise UsageError("tasks of the harness must be named", found="none", remedy="for example arc_easy,piqa")
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError("--harness-path must be a folder of tasks", found=include_path)
    for option, value, least in (("--rows", rows, 1), ("--shots", shots, 0)):
        if value is not None:
            check_count(option, value, least=least)
