"""Text, numbers and data made safe and readable for pages, Markdown and the terminal."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lorary.evaluate.cells import is_base
from lorary.terminal import printable

MISSING = "–"

# What ends a cell, opens a tag or code, stands for another character, or makes a link; an address becomes one without
# any mark around it.
_MARKDOWN = {"&": "&amp;", "|": "\\|", "<": "&lt;", "`": "\\`", "](": "]\\(", "][": "]\\[", "://": ":\\//"}
_WWW = re.compile(r"(www)\.", re.IGNORECASE)


def text(value: object) -> str:
    """A string as HTML text or as a quoted attribute; no character of it can become markup, or move other text."""
    return escape(printable(str(value)), quote=True)


def markdown_text(value: object) -> str:
    """A string in a table of Markdown; nothing of it can end the cell or the line, or become a tag, link or code."""
    flat = printable(" ".join(str(value).splitlines())).replace("\\", "\\\\")
    for plain, escaped in _MARKDOWN.items():
        flat = flat.replace(plain, escaped)
    return _WWW.sub(r"\1\\.", flat)


def hundredths(value: float, digits: int = 1) -> str:
    """A value of 0..1 as points of 100.

    >>> hundredths(0.6125)
    '61.2'
    """
    return f"{100 * value:.{digits}f}"


def signed(value: float) -> str:
    """A difference in points of 100 with its sign, a true minus where it is negative.

    >>> signed(0.2)
    '+20.0'
    """
    points = hundredths(abs(value))
    if float(points) == 0:
        return points
    return f"{'+' if value > 0 else '−'}{points}"


def cosine(value: float) -> str:
    """A cosine or a silhouette with a true minus.

    >>> cosine(-0.25)
    '−0.25'
    """
    return f"{value:.2f}".replace("-", "−")


def percent(share: float) -> str:
    """A share of 0..1 in per cent."""
    return f"{hundredths(share)} %"


def signed_nats(value: float, *, plus: bool = False) -> str:
    """A number of nats with a true minus; what rounds to zero has no sign.

    >>> signed_nats(-0.5), signed_nats(-0.0001)
    ('−0.500', '0.000')
    """
    shown = f"{abs(value):.3f}"
    sign = "−" if value < 0 else "+" if plus else ""
    return shown if float(shown) == 0 else f"{sign}{shown}"


def enumerated(items: Sequence[str]) -> str:
    """Items as a list in running text.

    >>> enumerated(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]])) if items else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "task"), counted(2, "task")
    ('1 task', '2 tasks')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def left_out_words(failed: Sequence[tuple[str, str]]) -> str:
    """Which tasks are in no figure over tasks, and why; empty where all are.

    >>> left_out_words([("sst2", "arrow"), ("sst2", "norm")])
    'In no mean, comparison or gap: sst2 (failed: arrow, norm)'

    Args:
        failed: task and router of each failure that takes a task away.
    """
    routers: dict[str, list[str]] = {}
    for task, router in failed:
        routers.setdefault(task, []).append(router)
    tasks = [f"{task} (failed: {', '.join(names)})" for task, names in routers.items()]
    return f"In no mean, comparison or gap: {enumerated(tasks)}" if tasks else ""


def by_name_words(tasks_by_name: Mapping[str, Sequence[str]]) -> str:
    """Which adapters count as trained on a task by their names alone; empty where none does.

    Args:
        tasks_by_name: as an `Evaluation` has it.
    """
    if not tasks_by_name:
        return ""
    several = len(tasks_by_name) > 1
    pairs = [(library, name) for library, adapters in tasks_by_name.items() for name in adapters]
    names = [f"{name} ({library})" if several else name for library, name in pairs]
    return (
        f"No task is recorded for {enumerated(names)}: each counts as trained on the task that has its name. "
        "lorary library add --tasks records others"
    )


def template_words(choices: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> list[str]:
    """In which templates the base counts, how that was chosen, and what each gives throughout; none without a choice.

    Args:
        choices: as an `Evaluation` has them, as mappings.
        means: the same.
    """
    if not choices:
        return []
    counts = Counter(choice["template"] for choice in choices).most_common()
    counted_in = enumerated([f"in the template {name} on {counted(number, 'task')}" for name, number in counts])
    sizes = {split: [c["rows"] for c in choices if c["split"] == split and c["origin"] == "rows"]
             for split in ("val", "train")}  # fmt: skip
    sources = [f"{max(rows)} {words} rows of {counted(len(rows), 'task')}"
               for words, rows in (("validation", sizes["val"]), ("training", sizes["train"])) if rows]  # fmt: skip
    sentence = f"The base counts {counted_in}"
    sentence += f". This was chosen on up to {enumerated(sources)}" if sources else ""
    lines = [f"{sentence}, and never on test rows" if sources else sentence]
    for origin, words in (
        ("majority", "takes the choice of most other tasks"), ("default", "takes the base's own chat template")
    ):  # fmt: skip
        tasks = [choice["task"] for choice in choices if choice["origin"] == origin]
        lines += [f"Without such rows, each of these {words}: {enumerated(tasks)}"] if tasks else []
    shown: dict[str, dict[str, float]] = {}
    for mean in means:
        if is_base(mean["router"]):
            shown.setdefault(mean["split"], {}).setdefault(mean["router"], mean["mean"])
    for split, values in shown.items():
        names = [f"{name} {hundredths(value)}" for name, value in values.items()]
        lines += [f"Points on {split.replace('_', '-')} tasks: {', '.join(names)}"] if len(names) > 1 else []
    return lines


def script_json(document: Any) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element or open a comment."""
    # An escape means the same to a JSON parser, and nothing to an HTML parser.
    encoded = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return encoded.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
