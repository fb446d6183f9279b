"""Each file imports only from floors below; rooms on one floor do not know each other. And: the public names."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from house import FLOORS, circles, imports_of, modules_of, room_of, upward

SOURCE = Path(__file__).parents[1] / "src" / "lorary"

PUBLIC_NAMES = {
    "Adapter", "Library", "LoraFactors", "__version__", "add_expert", "attach", "cluster", "detach", "evaluate",
    "explain", "load", "load_base", "merge", "remove_expert", "replace_expert", "routing", "save", "trace", "which",
    "AdapterError", "BaseModelError", "LibraryError", "LoraryError", "MissingExtraError", "RouterError", "ShapeError",
    "TaskError", "TrainError", "UsageError",
}  # fmt: skip


def test_no_file_imports_from_its_own_floor_or_from_one_above() -> None:
    assert upward(SOURCE) == []


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(name) for name in modules_of(SOURCE)}
    assert rooms <= set(FLOORS), "give a new room its floor in tests/support/house.py and a page in docs/adr"
    assert set(FLOORS) <= rooms


def test_the_tree_of_the_readme_is_that_of_the_rooms() -> None:
    readme = (SOURCE.parents[1] / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("src/lorary/")[2].partition("```")[0]
    drawn = {}
    for line in tree.splitlines()[1:]:
        rooms, floor = re.findall(r"^  ([a-z_, ]+?)  +(\d+)(?:  |$)", line)[0]
        drawn |= dict.fromkeys(rooms.split(", "), int(floor))
    assert drawn == {room: floor for room, floor in FLOORS.items() if not room.startswith("__")}


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = modules_of(SOURCE)
    graph = {name: {other for _, other in imports_of(name, path, modules)} for name, path in modules.items()}
    assert circles(graph) == []


def write_package(folder: Path, files: Mapping[str, str]) -> Path:
    """A package `lorary` of a few files."""
    source = folder / "lorary"
    for name, code in files.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return source


EMPTY = dict.fromkeys(
    ("__init__.py", "errors.py", "adapter.py", "ops/gram.py", "cluster/mbc.py", "merge/linear.py", "cli/app.py",
     "route/uniform.py", "library/store.py", "build/jobs.py", "version.py"), ""
)  # fmt: skip


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("ops/a.py", "from lorary.library.store import Library"),
        ("ops/a.py", "def late():\n    import lorary.cli.app"),
        ("route/a.py", "from lorary.library import store"),
        ("cluster/a.py", "from ..merge.linear import mean"),
        ("data/a.py", "from lorary.ops import gram"),
        ("model/a.py", "from lorary import Library"),
        ("report/a.py", "from lorary.build.jobs import joint_units"),
        ("library/a.py", "import lorary"),
        ("errors.py", "from lorary import __version__"),
    ],
)
def test_a_made_up_violation_is_found(tmp_path: Path, file: str, code: str) -> None:
    assert len(upward(write_package(tmp_path, {**EMPTY, file: code}))) == 1


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("route/a.py", "from lorary.ops.gram import gram\nfrom lorary.adapter import Adapter"),
        ("route/a.py", "from .arrow import arrow_scores\nfrom lorary.route import uniform"),
        ("adapter.py", "from lorary.errors import ShapeError"),
        ("cli/a.py", "from lorary.version import __version__"),
        ("ops/a.py", "import torch\nimport lorary_plugins"),
    ],
)
def test_an_import_from_below_or_from_the_same_room_passes(tmp_path: Path, file: str, code: str) -> None:
    assert upward(write_package(tmp_path, {**EMPTY, "route/arrow.py": "", file: code})) == []


def test_a_made_up_circle_is_found(tmp_path: Path) -> None:
    files = {"ops/a.py": "from lorary.ops.b import b", "ops/b.py": "def late():\n    from lorary.ops import a"}
    modules = modules_of(write_package(tmp_path, {**EMPTY, **files}))
    graph = {name: {other for _, other in imports_of(name, path, modules)} for name, path in modules.items()}
    assert circles(graph) == [["lorary.ops.a", "lorary.ops.b"]]


def test_the_public_names_are_these() -> None:
    import lorary

    assert set(lorary.__all__) == PUBLIC_NAMES
    assert list(lorary.__all__) == sorted(lorary.__all__)
    assert set(lorary.__all__) <= set(dir(lorary))


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES))
def test_a_public_name_loads_and_is_documented(name: str) -> None:
    import lorary

    value = getattr(lorary, name)
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    import lorary

    with pytest.raises(AttributeError, match="no_such_name"):
        lorary.no_such_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "datasets", "numpy", "sklearn")
    code = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import lorary"
    code += f"; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
