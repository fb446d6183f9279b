"""`lorary library prepare`, and routers that use what it left."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run

from lorary.library.store import Library


@pytest.fixture
def library(
    tmp_path: Path, tiny_base_folder: Path, tiny_model: Any, random_adapter: Any, generator: Any
) -> tuple[Path, Path]:
    """A library of two imported adapters, and the task of one of them."""
    from tests.support.adapters import write_adapter

    library = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in ("colours", "sums"):
        write_adapter(random_adapter(tiny_model(), name, generator, layers=[1]), tmp_path / name)
        library.add(tmp_path / name)
    tasks = tmp_path / "tasks.jsonl"
    rows = [
        {"task": task, "split": "train", "source": f"{task} {i}", "target": task[:2]}
        for task in ("sky", "add")
        for i in range(4)
    ]
    tasks.write_text("\n".join(map(json.dumps, rows)))
    return library.path, tasks


def test_a_router_is_prepared_used_kept_and_refused(library: tuple[Path, Path], run: Run) -> None:
    path, tasks = library
    code, _, err = run("generate", path, "--router", "retrieval", "--prompt", "sky")
    assert code == 1
    assert f"remedy: lorary library prepare {path} --router retrieval" in err
    code, _, err = run("library", "prepare", path, "--router", "retrieval", "--tasks", tasks)
    assert code == 1
    assert "error: the tasks of expert 'colours' must be known" in err
    arguments = ("library", "prepare", path, "--router", "retrieval", "--tasks", tasks, "--map", "colours=sky,sums=add")
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["kind"], document["prepared"], document["kept"]) == ("retrieval_early", ["colours", "sums"], [])
    code, out, _ = run(*arguments)
    assert "0 experts prepared, 2 kept" in out
    code, out, err = run(
        "generate", path, "--router", "retrieval", "--top-k", 1, "--prompt", "add 2", "--max-new-tokens", 2, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["usage"] == {"colours": 0.0, "sums": 1.0}
    assert run("library", "verify", path)[0] == 0
    code, _, err = run("generate", path, "--router", "contrast", "--prompt", "add 2", "--max-new-tokens", 2)
    assert code == 0, err  # without data
    code, out, err = run("library", "prepare", path, "--router", "contrast")
    assert (code, out.count("0 experts prepared, 2 kept"), out.count("from prompts that ship with Lorary")) == (0, 1, 1)
    code, _, err = run("library", "prepare", path, "--router", "arrow", "--tasks", tasks)
    assert (code, len(err.splitlines())) == (1, 3)
