"""What docs/models.md says of families of base models, from the verdicts on tiny ones.

Run from the top folder: `python -m tests.support.family_tables`.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.support.families import FAMILIES, tiny_family

from lorary.formats.quiet import quiet_transformers
from lorary.model.kept import Verdict
from lorary.model.verdict import verdict_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: made by python -m tests.support.family_tables -->", "<!-- families: end -->"


@cache
def judged(family: str) -> tuple[Any, Verdict]:
    """A tiny model of a family and the verdict on it: in float64, where its attention computes in that."""
    with quiet_transformers():
        model = tiny_family(family)
        if model.config._attn_implementation == "eager":
            model = tiny_family(family, dtype=torch.float32)
    return model, verdict_of(model)


def section() -> str:
    """The generated part of the page."""
    verdicts = {family: judged(family)[1] for family in FAMILIES}
    taken = [family for family, verdict in verdicts.items() if not verdict.fault]
    silent = {family: _last_parts(verdicts[family]) for family in taken if verdicts[family].dead}
    version = ".".join(transformers.__version__.split(".")[:2])
    lines = [
        BEGIN,
        "",
        f"With transformers {version}, {len(taken)} of {len(FAMILIES)} tried families (by `model_type`) are taken:",
        "",
        *_wrapped(taken),
        "",
        "Some have linear layers that reach no logits. These are left out of `all-linear` and refused by name:",
        "",
        "| family | layers that reach no logits |",
        "|---|---|",
        *(f"| {family} | `{', '.join(parts)}` |" for family, parts in silent.items()),
        "",
        "The others are refused:",
        "",
        "| family | why: a base model |",
        "|---|---|",
        *(f"| {family} | {verdict.rule} |" for family, verdict in verdicts.items() if verdict.fault),
        "",
        END,
    ]
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with its generated part made anew."""
    before, rest = page.split(BEGIN)
    return before + section() + rest.split(END)[1]


def _last_parts(verdict: Verdict) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in verdict.dead))


def _wrapped(names: list[str]) -> Iterator[str]:
    line = ""
    for i, name in enumerate(names):
        word = name + ("," if i < len(names) - 1 else ".")
        if line and len(line) + len(word) + 1 > 118:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
