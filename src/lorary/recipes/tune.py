"""`lorary library tune`: opens a library, its base and tasks, and chooses the default router."""

from collections.abc import Sequence

from lorary.data.tasks import load_tasks
from lorary.evaluate.settings import EvaluateSettings
from lorary.evaluate.tune import CANDIDATES, Tuned, tune_library
from lorary.library.opening import base_of, template_of
from lorary.library.store import Library
from lorary.model.base import load_base
from lorary.recipes.base_options import BaseOptions


def run_tune(
    library_path: str,
    tasks: str,
    *,
    routers: Sequence[str] = CANDIDATES,
    rows: int = 8,
    load: BaseOptions | None = None,
) -> Tuned:
    """Try routers on the experts' own validation rows, and make the best one the library's default.

    Args:
        library_path: folder of the library.
        tasks: as `lorary.data.tasks.load_tasks` takes it.
        routers: the candidates, as `lorary.route.spec` reads them.
        rows: rows of each task.
        load: the base model; the library's own where None.

    Returns:
        What was chosen, and how every candidate did.

    Raises:
        LoraryError: as for `tune_library`.
    """
    load = load or BaseOptions()
    library = Library.open(library_path)
    settings = EvaluateSettings(tuple(routers), rows=rows, routing_rows=0, template=template_of(library, None))
    loaded = load_base(base_of(library, load.base), dtype=load.dtype, device=load.device)
    return tune_library(loaded, library, load_tasks(tasks), settings, force_base=load.force_base)
