"""`lorary explain`: which experts a prompt meets, and what they are worth to its answer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorary.cli.flags import CommandOptions, OptionValues, with_options
from lorary.cli.options import LibraryPath, Output, RouterChoice, RouterFields
from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.flags import flag
from lorary.recipes.base_options import BaseOptions


@dataclass(frozen=True)
class ExplainCommand:
    """What is explained, and how.

    Args:
        prompt: text to explain.
        prompts: one {"prompt": ..., "answer": ...} a line; answers are optional.
        answer: answer to the prompt; the router's own greedy one by default.
        against: compare with the choices of this router.
        without: take these experts out, one at a time; the most used by default.
        most: how many of the most used experts to take out.
        template: how prompts are written: `plain` or `chat`; as the experts were trained by default.
        max_new_tokens: most tokens of an answer that is not given.
        report: write a page with all of it.
    """

    prompt: str | None = None
    prompts: str | None = flag(None, metavar="FILE.jsonl")
    answer: str | None = None
    against: str | None = flag(None, metavar="ROUTER")
    without: tuple[str, ...] | None = flag(None, metavar="EXPERT,...")
    most: int = 8
    template: str | None = None
    max_new_tokens: int = 32
    report: str | None = flag(None, metavar="FILE.html")


@with_options
def explain(
    library: LibraryPath,
    options: Annotated[OptionValues, CommandOptions((ExplainCommand, RouterChoice, RouterFields, BaseOptions, Output))],
) -> None:
    """Show how prompts are routed: which experts, where, how surely, and what the answer owes them."""
    from lorary.evaluate.explain_trace import Prompt, read_prompts
    from lorary.recipes.explain import run_explain
    from lorary.report.explain import write_explanation
    from lorary.report.explain_text import print_explanation
    from lorary.report.explanation_json import explanation_json
    from lorary.report.shell import check_writable

    command, load = ExplainCommand(**options[ExplainCommand]), BaseOptions(**options[BaseOptions])
    prompt, prompts, answer, report = command.prompt, command.prompts, command.answer, command.report
    if (prompt is None) == (prompts is None):
        raise UsageError(
            "explain takes --prompt TEXT or --prompts FILE, one of them", found="both" if prompt else "none"
        )
    if answer is not None and prompts is not None:
        raise UsageError("--answer goes with --prompt", found="--prompts", remedy="give answers in the file")
    if report:
        check_writable(Path(report))
    requests = [Prompt(prompt, answer)] if prompt is not None else read_prompts(str(prompts))
    explanation = run_explain(
        library,
        requests,
        against=command.against,
        without=command.without,
        most=command.most,
        template=command.template,
        max_new_tokens=command.max_new_tokens,
        load=load,
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
