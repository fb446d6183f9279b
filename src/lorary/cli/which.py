"""`lorary which`: who answers a prompt how: each expert alone, the base and the router."""

import json
from dataclasses import dataclass
from typing import Annotated

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.flags import check_flags, flag
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class WhichCommand:
    """What is asked, and how much is shown.

    Args:
        prompt: text to answer.
        prompts: one prompt a line, or JSONL with `prompt` or `source` and perhaps `answer` or `target`.
        answer: right answer to the prompt: its loss is shown, too.
        template: how prompts are written: `plain` or `chat`; as the experts were trained by default.
        max_new_tokens: most tokens of an answer.
        top: show so many experts, those that the router weighs most; all by default.
    """

    prompt: str | None = None
    prompts: str | None = flag(None, metavar="FILE")
    answer: str | None = None
    template: str | None = None
    max_new_tokens: int = 32
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
    options: Annotated[OptionValues, CommandOptions((WhichCommand, RouterChoice, RouterFields, BaseOptions, Output))],
) -> None:
    """Ask each expert alone, the base and the router, side by side."""
    from lorary.evaluate.prompts import Prompt, read_prompts
    from lorary.recipes.which import run_which
    from lorary.report.which_text import print_which

    command = WhichCommand(**options[WhichCommand])
    result = run_which(
        library,
        [Prompt(command.prompt, command.answer)] if command.prompt is not None else read_prompts(str(command.prompts)),
        template=command.template,
        max_new_tokens=command.max_new_tokens,
        load=BaseOptions(**options[BaseOptions]),
        **route_fields(**options[RouterChoice], **options[RouterFields]),
    )
    if Output(**options[Output]).as_json:
        print(json.dumps(result.to_json(), allow_nan=False))
    else:
        print_which(result, command.top)
