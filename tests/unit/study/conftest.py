"""A study of every kind of stage over the tiny base, and its tasks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

STUDY = """
about: All kinds of stages, tiny.
base: {base}
tasks:
  train: {{reference: {tasks}, names: [alpha, beta, gamma, delta]}}
  held_out: {{reference: {tasks}, names: [omega]}}
train: {{steps: 3, rank: 2, batch_size: 2, evals: 1, learning_rate: 2e-2, val_rows: 2}}
evaluate: {{routing_rows: 1, top_k: 2}}
stages:
  - build: private
  - {{build: mbc, method: mbc, k: 2, private: private}}
  - {{evaluate: main, libraries: [private, mbc], routers: [arrow, oracle], held_in: 4, held_out: 4}}
  - {{build: part, method: subset, of: private, tasks: 2}}
  - {{build: other, train: {{seed: 1}}}}
  - {{drift: seed, library: private, against: other, k: 2}}
  - {{adapt: few, library: private, methods: [lora, mu], train: {{steps: 2}}, held_out: 4}}
questions:
  - {{ask: "Which is better?", pairs: [[mbc/arrow, private/arrow]]}}
  - {{ask: "How much is kept?", cells: [private/arrow], share_of: private/oracle}}
  - {{ask: "Where does the base win?", cells: [private/arrow], base_wins: true}}
  - {{ask: "What does a seed move?", drift: seed}}
  - {{ask: "Does a library help?", cells: [few/mu, few/base], against: few/lora}}
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a study."""
    return tmp_path / "out"


@pytest.fixture
def make_study(tmp_path: Path, tiny_base_folder: Path) -> Callable[..., Path]:
    """A factory: writes tasks and study, with changes of text, and returns the study's file."""

    def make(*changes: tuple[str, str], word: str = "up") -> Path:
        tasks = tmp_path / "tasks.jsonl"
        with open(tasks, "w") as file:
            for number, name in enumerate(("alpha", "beta", "gamma", "delta", "omega")):
                for split, count in (("train", 4), ("val", 2), ("test", 4)):
                    for i in range(count):
                        # Only alpha's data hangs on the word.
                        target = "down" if number % 2 or (word != "up" and name == "alpha") else "up"
                        row = {"task": name, "split": split, "source": f"{name} {split} {i}:", "target": target}
                        file.write(json.dumps({**row, "options": ["up", "down"]}) + "\n")
        text = STUDY.format(base=tiny_base_folder, tasks=tasks)
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "study.yaml"
        path.write_text(text)
        return path

    return make
