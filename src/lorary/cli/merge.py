"""`lorary merge`: parse, call one recipe, say where the result lies."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lorary.adapt.merge_settings import MergeSettings
from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output
from lorary.errors import UsageError
from lorary.flags import check_flags, flag, option_of
from lorary.recipes.base_options import BaseOptions

if TYPE_CHECKING:
    from lorary.recipes.merge import MergeResult


@dataclass(frozen=True)
class MergeCommand:
    """On what a merge is judged.

    Args:
        evaluate: judge the merge on these tasks, beside base, uniform and oracle of the library.
        names: with --evaluate: only these tasks, by name, separated by commas; all with test rows by default.
        rows: with --evaluate: use the first so many test rows of a task.
    """

    evaluate: str | None = flag(None, metavar="TASKS")
    names: tuple[str, ...] | None = flag(None, option="--tasks")
    rows: int = flag(100, least=1)

    def __post_init__(self) -> None:
        check_flags(self)


@with_options
def merge(
    library: LibraryPath,
    out: Annotated[str, typer.Option("--out", metavar="ADAPTER", help="folder of the result, new")],
    options: Annotated[OptionValues, CommandOptions((MergeSettings, MergeCommand, BaseOptions, Output))],
) -> None:
    """Make one adapter of several, without data."""
    command = MergeCommand(**options[MergeCommand])
    idle = [option_of(kind, name) for kind in (MergeCommand, BaseOptions) for name in options[kind]]
    if command.evaluate is None and idle:
        raise UsageError(f"{idle[0]} needs --evaluate", found="none", remedy="leave it out")
    from lorary.recipes.merge import run_merge

    load = BaseOptions(**options[BaseOptions])
    result = run_merge(
        library, out, tasks=command.evaluate, names=command.names, rows=command.rows, base=load.base, load=load,
        **options[MergeSettings],
    )  # fmt: skip
    print(json.dumps(asdict(result))) if Output(**options[Output]).as_json else _print(result)


def _print(result: "MergeResult") -> None:
    for name, count in result.partial.items():
        print(f"{name} lacks {count} of {len(result.errors)} layers: its update there counts as zero")
    if result.error:
        _print_errors(result)
    if result.means:
        print(f"{'':<10} {'split':<10} {'tasks':>5} {'mean':>7} {'low':>7} {'high':>7}")
        for mean in result.means:
            print(
                f"{mean.way:<10} {mean.split:<10} {mean.tasks:>5} {mean.mean:>7.3f} {mean.low:>7.3f} {mean.high:>7.3f}"
            )
    left_out = f", {result.error:.2%} of the update left out" if result.error else ""
    print(f"{len(result.parents)} adapters, rank {result.rank}{left_out}: {result.adapter}")


def _print_errors(result: "MergeResult") -> None:
    """What truncation left out of the layers, relative to the update of each."""
    print(f"{'layer':<60} {'left out':>9}")
    for path, error in result.errors.items():
        print(f"{path:<60} {error:>9.2%}")
