"""Answers side by side in the terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorary.display import table_console
from lorary.evaluate.which import CandidateAnswer, PromptAnswers, WhichResult
from lorary.report.tables import text_table

# Characters of an answer that are shown; --json has all of it.
MOST_SHOWN = 200


def print_which(result: WhichResult, top: int | None = None) -> None:
    """Print a table of answers and a verdict for each prompt.

    Args:
        result: the answers.
        top: how many experts to show, those with the largest weights; all where None.
    """
    console = table_console()
    for prompt in result.prompts:
        _print_prompt(console, prompt, top)
    answering = sum(prompt.seconds for prompt in result.prompts)
    console.print(f"loaded in {result.load_seconds:.1f} s, answered in {answering:.1f} s", highlight=False)


def _print_prompt(console: Console, prompt: PromptAnswers, top: int | None) -> None:
    console.print(Text.assemble(("prompt: ", "bold"), _shown(prompt.prompt)))
    if prompt.reference is not None:
        console.print(Text.assemble(("reference: ", "bold"), _shown(prompt.reference)))
    console.print(_table(prompt, top))
    console.print(Text(prompt.verdict))
    if prompt.reason:
        console.print(Text(prompt.reason))
    console.print()


def _table(prompt: PromptAnswers, top: int | None) -> Table:
    has_losses = prompt.reference is not None
    hidden = 0 if top is None else max(0, len(prompt.experts) - top)
    caption = f"{hidden} more experts: --json, or a larger --top" if hidden else None
    heads = ("<who", "<answer", ">weight", *([">loss"] if has_losses else []), "<")
    table = text_table("", *heads, caption=caption)
    table.title = None
    for answer in (prompt.router, prompt.base, *prompt.experts[: len(prompt.experts) - hidden]):
        loss = [] if answer.loss is None else [f"{answer.loss:.3f}"]
        weight = "" if answer.weight is None else f"{100 * answer.weight:.0f} %"
        name = answer.name if answer.kind != "router" else f"router {answer.name}"
        cut = "" if answer.is_finished else " ..."
        table.add_row(Text(name), Text(_shown(answer.text) + cut), weight, *loss, _remark(prompt, answer))
    return table


def _remark(prompt: PromptAnswers, answer: CandidateAnswer) -> str:
    remarks = ["right"] if prompt.is_right(answer) else []
    if answer.kind != "router" and prompt.agrees(answer):
        remarks.append("as the router")
    return ", ".join(remarks)


def _shown(text: str) -> str:
    flat = text.replace("\r\n", "\n").replace("\n", " / ") or "nothing: it ends at once"
    return flat if len(flat) <= MOST_SHOWN else f"{flat[: MOST_SHOWN - 3]}..."
