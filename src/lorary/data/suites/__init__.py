"""Suites: the paper's own tasks by one name, out of public data sets or local copies of them.

`zero-shot`, `sni-12` and `flan-256` are read from the Hugging Face Hub, `zero-shot@FOLDER` and so on from copies below
a folder. Text only: the multi-modal tasks that the paper's code also knows are no part of them.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lorary.data.schema import Task
from lorary.data.suites.flan import FLAN_TASKS, load_flan
from lorary.data.suites.sni import SNI_TASKS, load_sni
from lorary.data.suites.zero_shot import ZERO_SHOT, load_zero_shot

# What loads the named tasks of a suite, from a folder of copies or from the Hub where None.
Load = Callable[[Collection[str], Path | None], dict[str, Task]]
SUITES: Mapping[str, tuple[Collection[str], Load]] = {
    "zero-shot": (ZERO_SHOT, load_zero_shot),
    "sni-12": (SNI_TASKS, load_sni),
    "flan-256": (FLAN_TASKS, load_flan),
}


def is_suite(reference: str) -> bool:
    """Whether a reference names a suite, with a folder of copies behind an @ or without."""
    return reference.partition("@")[0] in SUITES


def suite_tasks(reference: str) -> Collection[str]:
    """Names of the tasks of a suite, known without reading anything."""
    return SUITES[reference.partition("@")[0]][0]


def load_suite(reference: str, names: Collection[str]) -> dict[str, Task]:
    """Load tasks of a suite; only the data sets that hold them are read.

    Args:
        reference: NAME or NAME@FOLDER.
        names: some of `suite_tasks`.

    Raises:
        TaskError: if a data set cannot be read, or has other columns than it is known for.
    """
    name, at, folder = reference.partition("@")
    return SUITES[name][1](names, Path(folder).expanduser() if at else None)
