"""HumanEval and MBPP as the paper asks them: sampled once, nearly greedily, and cut at a blank line."""

from collections.abc import Mapping
from typing import Any

GENERATION = {"max_new_tokens": 300, "stop": ["\n\n", "\ndef"], "temperature": 0.05, "top_p": 0.95}


def humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    """A function to complete, with the tests that HumanEval keeps in `check`."""
    extra = {key: row[key] for key in ("task_id", "test", "entry_point")}
    return {
        "source": row["prompt"].lstrip(),
        "target": row["canonical_solution"],
        "extra": {**extra, "generation": GENERATION},
    }


def mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    """A function to complete, out of its first line and a docstring of the task and all of its tests."""
    header, _, body = row["code"].partition(":")
    docstring = "\n\t".join([row["prompt"], *row["test_list"]])
    tests = [*row["test_imports"], *row["test_list"]]
    return {
        "source": f'{header}:\n\t"""\n\t{docstring}\n\t"""\n',
        "target": body.lstrip("\n"),
        "extra": {"task_id": row["task_id"], "test": tests, "generation": GENERATION},
    }
