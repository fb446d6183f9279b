"""The model card of a library on the Hub: what it is, its adapters and how it did."""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from lorary.library.store import Library

# A card without it was written by hand, and is left as it is.
MARK = "<!-- Made by lorary library push. Without this line, the next push leaves the card as it is. -->"
MOST_ROWS = 200
MOST_TASKS = 5


def model_card(library: Library, results: Sequence[Mapping[str, Any]]) -> bytes:
    """A README.md with the metadata that the Hub reads.

    Args:
        library: what is pushed.
        results: lines of a table of results, each with the same keys in the order of its columns; may be empty.
    """
    base = library.base.name
    head = ["library_name: lorary", "tags:", "- lora", "- peft", "- lorary"]
    if base.count("/") == 1 and not base.startswith(("/", ".", "~")):  # a Hub id
        head += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    rows = library.describe()
    listed = [
        {
            "adapter": row["name"],
            "rank": row["rank"],
            "parameters": f"{row['num_parameters']:,}",
            "tasks": ", ".join(row["tasks"][:MOST_TASKS]) + ", ..." * (len(row["tasks"]) > MOST_TASKS),
        }
        for row in rows
    ]
    text = [
        "---", *head, "---", "", MARK, "",
        f"# {_cell(library.name)}", "",
        f"A library of {len(rows)} LoRA adapters over one frozen base model, {_cell(PurePath(base).name)}.", "",
        "## Adapters", "", *_table(listed), "",
    ]  # fmt: skip
    if results:
        text += ["## Results", "", *_table(results), ""]
    text += [
        "## Use", "",
        "Each folder in `adapters/` is a plain PEFT adapter. The whole library opens with Lorary:", "",
        "```python", "import lorary", "", 'library = lorary.Library.open("hf://USER/NAME")', "```", "",
    ]  # fmt: skip
    return "\n".join(text).encode("utf-8", "replace")


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["There are none yet."]
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows[:MOST_ROWS])]
    more = [f"... and {len(rows) - MOST_ROWS} more."] if len(rows) > MOST_ROWS else []
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines] + more


def _cell(value: object) -> str:
    """A value that breaks no table and makes no markup."""
    text = " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
    return text[:200]
