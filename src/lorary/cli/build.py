"""`lorary build`: parse, call one recipe, say where the result lies."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.build.cluster_settings import ClusterSettings
from lorary.build.methods import MHR_SPLITS, MethodSettings, PolySettings, method_settings
from lorary.build.settings import BuildSettings, BuildSource, RunSettings, preset
from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import Output, Preset, TasksReference
from lorary.errors import UsageError
from lorary.flags import flag

if TYPE_CHECKING:
    from lorary.build.build_library import BuildResult


@dataclass(frozen=True)
class BuildCommand:
    """How the command is called.

    Args:
        library: folder of the library, in place of LIB.
        overrides: other settings of single experts: {"NAME": {"rank": 8}}.
        executor: where experts are trained: local, ray, ray://auto or ray://HOST[:PORT].
        dry_run: say what it takes, and write nothing.
    """

    library: str | None = flag(None, metavar="LIB")
    overrides: str | None = flag(None, metavar="FILE.json")
    executor: str = "local"
    dry_run: bool = False

    def folder(self, argument: str | None) -> str:
        """The folder of the library, which is given once: as LIB or by `--library`.

        Raises:
            UsageError: if it is given twice, or not at all.
        """
        folders = [folder for folder in (argument, self.library) if folder is not None]
        if len(folders) != 1:
            raise UsageError("build needs one library", found=folders or "no LIB", remedy="lorary build TASKS LIB")
        return folders[0]


_SETTINGS = (BuildCommand, BuildSource, Preset, MethodSettings, BuildSettings, ClusterSettings, PolySettings)


@with_options
def build(
    tasks: TasksReference,
    options: Annotated[
        OptionValues,
        CommandOptions(
            (*_SETTINGS, RunSettings, Output),
            defaults={"splits": str(MHR_SPLITS)},
        ),
    ],
    folder: Annotated[
        str | None, typer.Argument(metavar="LIB", help="folder of the library, new or not", show_default=False)
    ] = None,
) -> None:
    """Train a library of experts. Run it again to go on after an interruption."""
    command, source = BuildCommand(**options[BuildCommand]), BuildSource(**options[BuildSource])
    as_json, name = Output(**options[Output]).as_json, Preset(**options[Preset]).preset
    library, settings = command.folder(folder), preset(name, **options[BuildSettings])
    method = method_settings(
        preset=name,
        overrides=command.overrides,
        mbc=options[ClusterSettings],
        poly=options[PolySettings],
        sampling=options[BuildSettings].get("sampling"),
        **options[MethodSettings],
    )
    if method.is_poly and options[BuildSettings].get("init") == "shared":
        raise UsageError("--init must be own for skills, which would stay alike", found="shared", remedy="leave it out")
    run = RunSettings(**options[RunSettings])
    if command.dry_run:
        from lorary.recipes.estimate import run_estimate

        estimate = run_estimate(tasks, library, settings, method, source=source, run=run)
        print(json.dumps(asdict(estimate)) if as_json else estimate.text())
        return
    from lorary.recipes.build import run_build
    from lorary.train.choose_executor import make_executor

    executor = None
    if command.executor != "local" or source.workers is not None:
        executor = make_executor(
            command.executor, workers=source.workers, device=run.device, debug="--debug" in sys.argv
        )
    result = run_build(tasks, library, settings, method, source=source, run=run, executor=executor)
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        _print(result)


def _print(result: "BuildResult") -> None:
    for row in result.choice:
        mark = "   chosen" if row["chosen"] else ""
        print(f"k {row['k']:>4}   mean validation loss over tasks {row['val_loss']:.4f}{mark}")
    print(f"{'expert':<32} {'base':>8} {'expert':>8}   validation loss, nats per target token")
    for name, tasks in result.tasks.items():
        losses = [f"{loss:.3f}" for loss in result.val_losses.get(name, ())] or ["-", "-"]
        print(f"{name:<32} {losses[0]:>8} {losses[1]:>8}   {'' if tasks == [name] else ', '.join(tasks)}".rstrip())
    print(f"{len(result.trained)} experts trained, {len(result.kept)} kept: {result.library}")
