"""`lorary which`: who answers a prompt how: each expert alone, the base and the router."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorary.cli.flags import CommandOptions, with_options
from lorary.cli.options import LibraryPath, Output, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.evaluate.settings import WhichSettings
from lorary.flags import OptionValues, check_flags, flag
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class WhichCommand:
    """What is asked, and how much is shown.

    Args:
        prompt: text to answer.
        prompts: one prompt a line, or JSONL: {"prompt": ..., "answer": ...}; answers are optional.
        answer: right answer to the prompt: its loss is shown, too.
        top: show so many experts, those that the router weighs most; all by default.
    """

    prompt: str | None = None
    prompts: str | None = flag(None, metavar="FILE")
    answer: str | None = None
    top: int | None = flag(None, least=0)

    def __post_init__(self) -> None:
        check_flags(self)
        if (self.prompt is None) == (self.prompts is None):
            raise UsageError(
                "which takes --prompt TEXT or --prompts FILE, one of them", found="both" if self.prompt else "none"
            )
        if self.answer is not None and self.prompts is not None:
            raise UsageError("--answer goes with --prompt", found="--prompts", remedy="give answers in the file")


@with_options
def which(
    library: LibraryPath,
    options: Annotated[
        OptionValues,
        CommandOptions(
            (WhichCommand, RouterChoice, RouterFields, WhichSettings, BaseOptions, Output),
            defaults=dict.fromkeys(("top_k", "temperature", "mix"), "the library's"),
        ),
    ],
) -> None:
    """Ask each expert alone, the base and the router, side by side."""
    from lorary.recipes.which import which as ask_each
    from lorary.report.which_text import print_which

    command = WhichCommand(**options[WhichCommand])
    result = ask_each(
        library,
        Path(command.prompts) if command.prompts is not None else command.prompt,
        answer=command.answer,
        **options[WhichSettings],
        **options[BaseOptions],
        **route_fields(**options[RouterChoice], **options[RouterFields]),
    )
    if Output(**options[Output]).as_json:
        print(json.dumps(result.to_json(), allow_nan=False))
    else:
        print_which(result, command.top)
