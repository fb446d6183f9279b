"""`lorary evaluate` over several libraries, with cells that fail, and its files."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run

from lorary.evaluate import seated_base as bench
from lorary.library.store import Library


@pytest.fixture
def libraries(
    tmp_path: Path, tiny_base_folder: Path, tiny_model: Callable[..., Any], random_adapter: Callable[..., Any],
    generator: torch.Generator,
) -> tuple[Path, Path]:  # fmt: skip
    """Two libraries of two random experts each, in folders of one name."""
    made = []
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        library = Library.create(tmp_path / parent / "lib", str(tiny_base_folder))
        for name in ("a", "b"):
            library.add_adapter(random_adapter(tiny_model(), name, generator), {"tasks": [name]})
        made.append(library.path)
    return made[0], made[1]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks with two test rows each."""
    path = tmp_path / "tasks.jsonl"
    rows = [
        {"task": t, "family": "f", "split": "test", "source": f"{t} {i}:", "target": "up"} for t in "ab" for i in (1, 2)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_libraries_and_routers_in_one_run_with_all_files_and_nothing_loaded_again(
    libraries: tuple[Path, Path], tasks: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"--csv": tmp_path / "c.csv", "--markdown": tmp_path / "t.md", "--report": tmp_path / "r.html"}
    command = (
        "evaluate", libraries[0], tasks, "--also", libraries[1], "--rows", 2, "--routers",
        "arrow[top_k=1,temperature=0.5],uniform,oracle", *(part for pair in files.items() for part in pair),
    )  # fmt: skip
    outcome = run(*command, "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["libraries"] == ["one/lib", "two/lib"]
    primary = [(c["library"], c["router"], c["task"]) for c in document["cells"] if c["primary"]]
    routers = ("base", "arrow[top_k=1,temperature=0.5]", "uniform", "oracle")
    assert primary == [(library, r, t) for library in document["libraries"] for t in "ab" for r in routers]
    assert document["routers"]["arrow[top_k=1,temperature=0.5]"]["temperature"] == 0.5
    lines = files["--csv"].read_text(encoding="utf-8").splitlines()
    assert len(list(csv.DictReader(lines))) == len(document["cells"])
    assert "one/lib: uniform" in files["--markdown"].read_text(encoding="utf-8")
    assert "</html>" in files["--report"].read_text(encoding="utf-8")

    monkeypatch.setattr(bench, "load_base", lambda *_, **__: pytest.fail("nothing is to be computed"))
    assert json.loads(run(*command, "--json").out) == document
    shown = run(*command)
    assert shown.code == 0
    assert f"cells: {files['--csv']}" in shown.out


def test_a_failed_cell_ends_with_exit_code_1_and_everything_else_is_there(
    libraries: tuple[Path, Path], tasks: Path, run: Run, tmp_path: Path
) -> None:
    command = ("evaluate", libraries[0], tasks, "--rows", 2, "--routers", "experts[a],experts[nobody]")
    outcome = run(*command, "--markdown", tmp_path / "t.md", "--json")
    assert outcome.code == 1
    document = json.loads(outcome.out)
    assert {c["router"] for c in document["cells"]} == {"base", "experts[a]"}
    assert [(f["router"], f["task"]) for f in document["failures"]] == [("experts[nobody]", t) for t in "ab"]
    assert "error: 2 of 6 cells could not be scored, the first of them lib, experts[nobody], a" in outcome.err
    assert "Traceback" not in outcome.err
    assert "## Failed cells" in (tmp_path / "t.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--routers", "arrow[top_k=0]"), 2, "top_k"),
        (("--routers", "arrow[top_k=2"), 2, "closed"),
        (("--routers", "arrow[top_k]"), 2, "FIELD=VALUE"),
        (("--also", "{library}"), 2, "each of them once"),
        (("--csv", "{library}"), 2, "writable"),
        (("--markdown", "{library}/no/t.md"), 2, "writable"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_done(
    libraries: tuple[Path, Path], tasks: Path, run: Run, arguments: tuple[str, ...], code: int, message: str
) -> None:
    asked = [argument.format(library=libraries[0]) for argument in arguments]
    outcome = run("evaluate", libraries[0], tasks, "--rows", 2, *asked)
    assert (outcome.code, message in outcome.err) == (code, True), outcome.err
    assert not (libraries[0] / "results").exists()
