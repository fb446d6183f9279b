"""The ten tasks on which the paper evaluates without training, with its prompts, splits and ways of scoring.

Hub ids are those under which the data sets can be read without running code that comes with them.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorary.data.schema import Task
from lorary.data.suites.bbh import load_bbh
from lorary.data.suites.code import humaneval, mbpp
from lorary.data.suites.public import Public, choice, made_of, read_public, suite_task

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How one task is made of a data set.

    Args:
        source: the data set.
        columns: what `fields` reads of it.
        fields: a row of the data set becomes the fields of one of ours.
        metric: of the task.
    """

    source: Public
    columns: tuple[str, ...]
    fields: Callable[[Record], dict[str, Any]]
    metric: str = "acc"


def _arc(row: Record) -> dict[str, Any]:
    choices = row["choices"]
    right = list(choices["label"]).index(row["answerKey"])  # letters, or figures in some rows
    return choice(f"Question: {row['question']}\nAnswer:", choices["text"], right)


def _piqa(row: Record) -> dict[str, Any]:
    return choice(f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"]), row["label"])


def _boolq(row: Record) -> dict[str, Any]:
    return choice(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ("no", "yes"), row["label"])


def _hellaswag(row: Record) -> dict[str, Any]:
    context = _without_markup(f"{row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = [_without_markup(ending) for ending in row["endings"]]
    return choice(f"{_without_markup(row['activity_label'])}: {context}", endings, int(row["label"]))


def _without_markup(text: str) -> str:
    """WikiHow's titles become sentences, other marks in brackets go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _winogrande(row: Record) -> dict[str, Any]:
    before, _, after = row["sentence"].partition("_")
    if not after.strip():
        raise ValueError("nothing after the gap")
    options = (row["option1"], row["option2"])
    extra = {"contexts": [before + option for option in options], "continuation": after.strip()}
    return choice(row["sentence"], options, int(row["answer"]) - 1, extra=extra)


def _openbookqa(row: Record) -> dict[str, Any]:
    choices = row["choices"]
    return choice(row["question_stem"], choices["text"], list(choices["label"]).index(row["answerKey"].strip()))


_ARC = ("question", "choices", "answerKey")
RECIPES = {
    "arc_challenge": Recipe(Public("allenai/ai2_arc", "test", "ARC-Challenge"), _ARC, _arc),
    "arc_easy": Recipe(Public("allenai/ai2_arc", "test", "ARC-Easy"), _ARC, _arc),
    "boolq": Recipe(Public("aps/super_glue", "validation", "boolq"), ("passage", "question", "label"), _boolq),
    "hellaswag": Recipe(
        Public("Rowan/hellaswag", "validation"), ("ctx_a", "ctx_b", "activity_label", "endings", "label"), _hellaswag
    ),
    "humaneval": Recipe(
        Public("openai/openai_humaneval", "test"),
        ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        humaneval,
        "pass@1",
    ),
    "mbpp": Recipe(
        Public("google-research-datasets/mbpp", "test", "sanitized"),
        ("task_id", "prompt", "code", "test_imports", "test_list"),
        mbpp,
        "pass@1",
    ),
    "openbookqa": Recipe(
        Public("allenai/openbookqa", "test", "main"), ("question_stem", "choices", "answerKey"), _openbookqa
    ),
    "piqa": Recipe(Public("baber/piqa", "validation"), ("goal", "sol1", "sol2", "label"), _piqa),
    "winogrande": Recipe(
        Public("allenai/winogrande", "validation", "winogrande_xl"),
        ("sentence", "option1", "option2", "answer"),
        _winogrande,
    ),
}
ZERO_SHOT = tuple(sorted((*RECIPES, "bbh")))


def load_zero_shot(names: Collection[str], copies: Path | None) -> dict[str, Task]:
    """Load some of the ten tasks.

    Args:
        names: some of `ZERO_SHOT`.
        copies: folder of copies of the data sets; the Hub is asked where None.

    Raises:
        TaskError: if a data set cannot be read.
    """
    return {name: load_bbh(copies) if name == "bbh" else _load(name, copies) for name in sorted(names)}


def _load(name: str, copies: Path | None) -> Task:
    recipe = RECIPES[name]
    rows: Iterable[Record] = read_public(recipe.source, recipe.columns, copies)
    records = made_of(rows, recipe.fields, recipe.source)
    return suite_task(name, records, recipe.source, family="zero-shot", metric=recipe.metric)
