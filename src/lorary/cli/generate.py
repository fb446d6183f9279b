"""`lorary generate`: parse, call one recipe, print the answer."""

import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.evaluate.sampling import Sampling
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class GenerateCommand:
    """How a prompt is answered.

    Args:
        template: how the prompt is written: `plain` or `chat`; as the experts were trained by default.
        max_new_tokens: most tokens of the answer.
        sample: draw tokens instead of taking the likeliest ones.
        seed: sampling: its seed.
        stream: print the answer while it is made.
    """

    template: str | None = None
    max_new_tokens: int = 64
    sample: bool = False
    seed: int = 0
    stream: bool = False


@with_options
def generate(
    library: LibraryPath,
    prompt: Annotated[str, typer.Option(help="text to answer")],
    options: Annotated[
        OptionValues, CommandOptions((RouterChoice, RouterFields, GenerateCommand, Sampling, BaseOptions, Output))
    ],
) -> None:
    """Answer a prompt with the routed library."""
    from lorary.recipes.generate import run_generate

    as_json, changes = Output(**options[Output]).as_json, dict(options[GenerateCommand])
    is_streamed, is_sampled = changes.pop("stream", False), changes.pop("sample", False)
    sampling = Sampling(**options[Sampling]) if is_sampled or options[Sampling] else None
    answer = run_generate(
        library,
        prompt,
        sampling=sampling,
        stream=is_streamed and not as_json,
        load=BaseOptions(**options[BaseOptions]),
        **changes,
        **route_fields(**options[RouterChoice], **options[RouterFields]),
    )
    if as_json:
        print(json.dumps(asdict(answer)))
        return
    if not is_streamed:
        print(answer.text)
    if answer.reason:
        print(answer.reason, file=sys.stderr)
