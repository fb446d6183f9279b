"""`lorary explain`: which experts a prompt meets, and what they are worth to its answer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.evaluate.settings import ExplainSettings
from lorary.flags import flag
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class ExplainCommand:
    """What is explained, and where the result goes.

    Args:
        prompt: text to explain.
        prompts: one prompt a line, or JSONL: {"prompt": ..., "answer": ...}; answers are optional.
        answer: answer to the prompt; the router's own greedy one by default.
        report: write a page that opens offline and needs no further package.
    """

    prompt: str | None = None
    prompts: str | None = flag(None, metavar="FILE")
    answer: str | None = None
    report: str | None = flag(None, metavar="FILE.html")


@with_options
def explain(
    library: LibraryPath,
    options: Annotated[
        OptionValues,
        CommandOptions(
            (ExplainCommand, RouterChoice, RouterFields, ExplainSettings, BaseOptions, Output),
            defaults=dict.fromkeys(("top_k", "temperature", "mix"), "the library's"),
        ),
    ],
) -> None:
    """Show how prompts are routed: which experts, where, how surely, and what the answer owes them."""
    from lorary.recipes.explain import explain as explain_prompts
    from lorary.report.explain import write_explanation
    from lorary.report.explain_text import print_explanation
    from lorary.report.explanation_json import explanation_json
    from lorary.report.shell import check_writable

    command = ExplainCommand(**options[ExplainCommand])
    prompt, prompts, report = command.prompt, command.prompts, command.report
    if (prompt is None) == (prompts is None):
        raise UsageError(
            "explain takes --prompt TEXT or --prompts FILE, one of them", found="both" if prompt else "none"
        )
    if command.answer is not None and prompts is not None:
        raise UsageError("--answer goes with --prompt", found="--prompts", remedy="give answers in the file")
    if report:
        check_writable(Path(report))
    explanation = explain_prompts(
        library,
        Path(prompts) if prompts is not None else prompt,
        answer=command.answer,
        **options[ExplainSettings],
        **options[BaseOptions],
        **route_fields(**options[RouterChoice], **options[RouterFields]),
    )
    if report:
        write_explanation(Path(report), explanation)
    if Output(**options[Output]).as_json:
        print(json.dumps(explanation_json(explanation), allow_nan=False))
        return
    print_explanation(explanation)
    if report:
        print(f"report: {report}")
