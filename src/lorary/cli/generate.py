"""`lorary generate`: parse, call one recipe, print the answer."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class GenerateCommand:
    """How a prompt is answered.

    Args:
        template: how the prompt is written: `plain` or `chat`; as the experts were trained by default.
        max_new_tokens: most tokens of the answer.
        sample: sample instead of taking the likeliest token.
        seed: seed of sampling.
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
        OptionValues, CommandOptions((RouterChoice, RouterFields, GenerateCommand, BaseOptions, Output))
    ],
) -> None:
    """Answer a prompt with the routed library."""
    from lorary.recipes.generate import run_generate

    as_json, changes = Output(**options[Output]).as_json, dict(options[GenerateCommand])
    is_streamed = changes.pop("stream", False)
    answer = run_generate(
        library,
        prompt,
        stream=is_streamed and not as_json,
        load=BaseOptions(**options[BaseOptions]),
        **changes,
        **route_fields(**options[RouterChoice], **options[RouterFields]),
    )
    if as_json:
        print(json.dumps(asdict(answer)))
    elif not is_streamed:
        print(answer.text)
