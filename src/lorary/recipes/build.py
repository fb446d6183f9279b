"""`lorary build`: opens tasks, base and library, and builds."""

from collections.abc import Sequence
from dataclasses import replace

from lorary.build.build_library import BuildResult, build_experts, choose_tasks, separate_tasks
from lorary.build.methods import MethodSettings
from lorary.build.settings import BuildSettings, BuildSource, RunSettings
from lorary.build.train_units import BuildContext
from lorary.display import Display
from lorary.library.opening import created_for
from lorary.model.base import load_base
from lorary.prepare.prepare_library import prepare_built
from lorary.train.callbacks import Callback
from lorary.train.executor import Executor


def run_build(
    tasks_reference: str,
    library_path: str,
    settings: BuildSettings,
    method: MethodSettings | None = None,
    *,
    source: BuildSource | None = None,
    run: RunSettings | None = None,
    executor: Executor | None = None,
    callbacks: Sequence[Callback] = (),
) -> BuildResult:
    """Load tasks and base, open or make the library, and build.

    Args:
        tasks_reference: as `lorary.data.tasks.load_tasks` takes it.
        library_path: folder of the library, new or not.
        settings: how to train.
        method: how to assign tasks to experts; one expert per task where None.
        source: base, tasks and workers.
        run: how to run.
        executor: trains shards of experts elsewhere; None trains in this process.
        callbacks: watch the training in this process, all stages of it; who opened them closes them.

    Returns:
        What was built.

    Raises:
        LoraryError: as `build_library`; also if tasks or base cannot be loaded.
    """
    method, source, run = method or MethodSettings(), source or BuildSource(), run or RunSettings()
    display, base = Display(), source.base
    chosen = choose_tasks(tasks_reference, source.names, source.columns)
    tasks, shared = separate_tasks(chosen, source.held_out, source.overlap, display)
    needs_base = executor is None or method.is_poly or len(method.clusters.k) > 1
    loaded = load_base(base, dtype=run.dtype, device=run.device) if needs_base else None
    with created_for(library_path, base) as library:
        context = BuildContext(
            library, tasks, run, display, loaded, base, tasks_reference, executor, source.workers, callbacks,
            tasks_columns=source.columns,
        )  # fmt: skip
        built = build_experts(context, settings, method)
        with_base = loaded or load_base(base, dtype=run.dtype, device=run.device)
        prepare_built(with_base, library, tasks, seed=settings.seed, display=display)
        return replace(built, overlap=None if shared is None else shared.to_json())
