"""What tests of builds share: four small tasks of two families, a tiny base, and an empty library over it."""

import json
from pathlib import Path

import pytest

from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.library.store import Library
from lorary.model.base import Base, load_base


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four tasks of two families, in a file: two say up, two say down."""
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    with open(path, "w") as file:
        for number, name in enumerate(("alpha", "beta", "gamma", "delta")):
            for split, count in (("train", 6 + number), ("val", 3)):
                for i in range(count):
                    row = {"task": name, "family": ["even", "odd"][number % 2], "split": split}
                    target = "up" if number % 2 else "down"
                    file.write(json.dumps({**row, "source": f"{name} {split} {i}:", "target": target}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def tasks(reference: str) -> dict[str, Task]:
    """These tasks."""
    return load_tasks(reference)


@pytest.fixture(scope="session")
def base(tiny_base_folder: Path) -> Base:
    """The tiny base, loaded."""
    return load_base(str(tiny_base_folder))


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    """An empty library over the tiny base."""
    return Library.create(tmp_path / "lib", str(tiny_base_folder))
