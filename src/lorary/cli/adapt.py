"""`lorary adapt`: parse, call one recipe, say where the result lies."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

from lorary.adapt.settings import LORA, AdaptSettings, adapt_settings
from lorary.build.settings import BuildSettings, RunSettings, preset
from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, Preset, TasksReference
from lorary.errors import UsageError
from lorary.flags import flag, option_of

if TYPE_CHECKING:
    from lorary.adapt.adapt_library import AdaptResult

# Of a method that starts from adapters, these are those of the adapters.
_LAYERS = ("alpha", "target_modules", "upper_layers")


@dataclass(frozen=True)
class AdaptCommand:
    """What is adapted to, over which base, and where it goes.

    Args:
        names: only these tasks, by name, separated by commas.
        columns: columns of your own data that hold prompt and answer, such as source=question,target=reply.
        into: library of the results, new or not; LIB itself by default.
        base: base model: embedded, a transformers folder, a .gguf file or a Hub id; the library's own by default.
    """

    names: tuple[str, ...] | None = flag(None, option="--tasks")
    columns: str | None = flag(None, metavar="FIELD=COLUMN,...")
    into: str | None = flag(None, metavar="LIB2")
    base: str | None = None


@with_options
def adapt(
    library: LibraryPath,
    tasks: TasksReference,
    options: Annotated[
        OptionValues,
        CommandOptions(
            (AdaptCommand, AdaptSettings, Preset, BuildSettings, RunSettings, Output),
            omit={BuildSettings: ("rank", "init", "sampling")},
            methods=dict.fromkeys(_LAYERS, (LORA,)),
            defaults={"template": "that of the library"},
        ),
    ],
) -> None:
    """Adapt to new tasks, from scratch or out of a library. Run it again to go on after an interruption."""
    from lorary.library.opening import template_of
    from lorary.library.store import Library
    from lorary.recipes.adapt import run_adapt

    train, changes = dict(options[BuildSettings]), dict(options[AdaptSettings])
    method = changes.pop("method", LORA)
    if method != LORA and changes.get("retrieve") != "delta" and (idle := [key for key in _LAYERS if key in train]):
        raise UsageError(
            f"{', '.join(option_of(BuildSettings, key) for key in idle)} needs --method lora",
            found=f"--method {method}",
            remedy="leave it out: the layers and the scaling are those of what it begins with",
        )
    if train.get("steps") == 0:
        changes["zero_shot"] = train.pop("steps") == 0
    if "template" not in train:
        train["template"] = template_of(Library.open(library), None)
    settings = adapt_settings(method, preset(Preset(**options[Preset]).preset, **train), **changes)
    command, run = AdaptCommand(**options[AdaptCommand]), RunSettings(**options[RunSettings])
    result = run_adapt(
        library, tasks, settings, names=command.names, columns=command.columns, into=command.into, base=command.base,
        run=run,
    )  # fmt: skip
    print(json.dumps(asdict(result))) if Output(**options[Output]).as_json else _print(result)


def _print(result: "AdaptResult") -> None:
    print(f"{'adapter':<36} {'base':>8} {'start':>8} {'adapted':>8}   validation loss, nats per target token")
    for task, name in result.names.items():
        losses = "".join(f" {loss:>8.3f}" for loss in result.val_losses[task])
        parents = result.parents[task]
        notes = [", ".join(parents) if len(parents) <= 5 else f"{len(parents)} adapters"] if parents else []
        if result.errors[task]:
            notes.append(f"truncated: {result.errors[task]:.1%} of the update left out")
        print(f"{name:<36}{losses}   {'; '.join(notes)}".rstrip())
    print(f"{len(result.adapted)} tasks adapted to, {len(result.kept)} kept: {result.library}")
