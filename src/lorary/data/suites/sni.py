"""The twelve held-out tasks of Super-NaturalInstructions, with the paper's prompt and its 100 instances a task."""

import string
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lorary.data.schema import Task
from lorary.data.suites.public import Public, read_public, suite_task
from lorary.errors import TaskError
from lorary.reading import read_json

SNI_TASKS = (
    "task035_winogrande_question_modification_person",
    "task039_qasc_find_overlapping_words",
    "task1153_bard_analogical_reasoning_affordance",
    "task1356_xlsum_title_generation",
    "task1557_jfleg_answer_generation",
    "task1728_web_nlg_data_to_text",
    "task202_mnli_contradiction_classification",
    "task242_tweetqa_classification",
    "task304_numeric_fused_head_resolution",
    "task362_spolin_yesand_prompt_response_sub_classification",
    "task613_politifact_text_generation",
    "task614_glucose_cause_event_detection",
)
NUM_TEST = 100
GENERATION = {"max_new_tokens": 128}
# The longest tasks of the repository are large documents of texts.
MOST_PARSED_BYTES = 1024 * 1024 * 1024
REPOSITORY = "allenai/natural-instructions"
ON_THE_HUB = Public("Muennighoff/natural-instructions", "test")

# An instance: its input and all its outputs.
Instance = tuple[str, list[str]]


def load_sni(names: Collection[str], copies: Path | None) -> dict[str, Task]:
    """Load some of the twelve tasks: the first 100 instances are `test`, as in the data set.

    The next 100 are `val` and the others `train`, for adapting to them: the paper does not say which it took.

    Args:
        names: some of `SNI_TASKS`.
        copies: folder with the files of the GitHub repository, FOLDER/allenai/natural-instructions/tasks/TASK.json; the
            Hub is asked where None.

    Raises:
        TaskError: if the data set cannot be read.
    """
    records = _from_hub(names) if copies is None else {name: _from_file(name, copies) for name in names}
    return {
        name: suite_task(name, _records(*records[name]), name, family="sni-12", metric="rougeL_single")
        for name in sorted(names)
    }


def _records(definition: str, instances: list[Instance]) -> Iterator[dict[str, Any]]:
    for number, (text, outputs) in enumerate(instances):
        targets = list(dict.fromkeys(output for output in outputs if output.strip()))
        yield {
            "split": ("test", "val")[number // NUM_TEST] if number < 2 * NUM_TEST else "train",
            "source": prompt(definition, text),
            "target": targets[0] if targets else "",
            "targets": targets,
            "extra": {"generation": GENERATION},
        }


def prompt(definition: str, text: str) -> str:
    """The paper's prompt without examples; definition and input end with a full stop where they have no mark."""
    return (
        f"Task definition: {_ended(definition)}\n"
        f"Now complete the following example -\nInput: {_ended(text)}\nOutput:"
    )  # fmt: skip


def _ended(text: str) -> str:
    text = text.strip()
    return text if text and text[-1] in string.punctuation else f"{text}."


def _from_file(name: str, copies: Path) -> tuple[str, list[Instance]]:
    path = copies / REPOSITORY / "tasks" / f"{name}.json"
    try:
        document = read_json(path, max_bytes=MOST_PARSED_BYTES)
        definition = document["Definition"]
        instances = [(item["input"], list(item["output"])) for item in document["Instances"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(
            f"task '{name}' must be read from its file of the repository {REPOSITORY}",
            found=f"{path}: {type(error).__name__} {error}",
            remedy=f"clone the repository to {copies / REPOSITORY}",
        ) from error
    return (definition if isinstance(definition, str) else definition[0]), instances


def _from_hub(names: Collection[str]) -> dict[str, tuple[str, list[Instance]]]:
    """Rows of the Hub's copy have one output each; those of one input, which follow each other, are one instance."""
    rows = read_public(ON_THE_HUB, ("task_name", "definition", "inputs", "targets"), None)
    selected = [i for i, name in enumerate(rows["task_name"]) if name in names]
    records: dict[str, tuple[str, list[Instance]]] = {}
    for row in rows.select(selected):
        _, instances = records.setdefault(row["task_name"], (row["definition"], []))
        if instances and instances[-1][0] == row["inputs"]:
            instances[-1][1].append(row["targets"])
        else:
            instances.append((row["inputs"], [row["targets"]]))
    if missing := sorted(set(names) - records.keys()):
        raise TaskError(f"data set {ON_THE_HUB} must hold the task '{missing[0]}'", found="no row of it")
    return records
