"""BIG-Bench Hard as the paper asks it: five shots, a short answer, exact match after normalising.

The paper's code takes the first five rows of each subtask as shots and scores them too. Here they are training rows, so
that nothing that stands in a prompt is scored.
"""

from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lorary.data.schema import Task
from lorary.data.suites.public import Public, read_public, suite_task

NUM_SHOTS = 5
GENERATION = {"max_new_tokens": 128, "stop": ["\n\n"]}
_SUBTASKS = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies "
    "geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects "
    "logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting "
    "penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting"
)
SUBTASKS = tuple(_SUBTASKS.split())


def load_bbh(copies: Path | None) -> Task:
    """Load all 27 subtasks as one task; rows go round the subtasks, so that the first few are a fair share.

    Args:
        copies: folder of copies of the data sets; the Hub is asked where None.

    Raises:
        TaskError: if the data set cannot be read.
    """
    parts = [list(_records(name, copies)) for name in SUBTASKS]
    mixed = [record for record in chain.from_iterable(zip_longest(*parts)) if record is not None]
    return suite_task("bbh", mixed, "SaylorTwift/bbh", family="zero-shot", metric="em_normalised")


def _records(name: str, copies: Path | None) -> Iterator[dict[str, Any]]:
    rows = list(read_public(Public("SaylorTwift/bbh", "test", name), ("input", "target"), copies))
    shots = ""
    for number, row in enumerate(rows):
        source = f"Solve the following problem: {row['input']}\nAnswer:"
        extra = {"subtask": name, "generation": GENERATION}
        if number < NUM_SHOTS:
            shots += f"{source} {row['target']}\n\n"
            yield {"split": "train", "source": source, "target": row["target"], "extra": extra}
        else:
            yield {"source": shots + source, "target": row["target"], "extra": extra}
