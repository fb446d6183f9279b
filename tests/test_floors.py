"""Each file imports only from floors below; rooms on one floor do not know each other. And: the public names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lorary"

# The floor of each room (a folder or a file of the package). The files of the ground floor are one room.
FLOORS = {
    "adapter": 0,
    "axes": 0,
    "caching": 0,
    "display": 0,
    "errors": 0,
    "keys": 0,
    "reading": 0,
    "version": 0,
    "ops": 1,
    "data": 1,
    "lora": 2,
    "formats": 2,
    "cluster": 2,
    "merge": 2,
    "library": 3,
    "route": 3,
    "model": 4,
    "train": 5,
    "evaluate": 5,
    "build": 6,
    "prepare": 6,
    "report": 6,
    "adapt": 7,
    "study": 8,
    "recipes": 9,
    "cli": 10,
    # The door: it knows everybody, and nobody inside goes through it.
    "__main__": 11,
    "__init__": 11,
}

PUBLIC_NAMES = {
    "Adapter", "Library", "LoraFactors", "__version__", "add_expert", "attach", "detach", "load", "load_base",
    "remove_expert", "replace_expert", "routing", "save", "trace",
    "AdapterError", "BaseModelError", "LibraryError", "LoraryError", "MissingExtraError", "RouterError", "ShapeError",
    "TaskError", "TrainError", "UsageError",
}  # fmt: skip


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(code: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """The rooms of Lorary that a file imports from, wherever in the file, with the line.

    Args:
        code: the file.
        package: the folders it lies in, from `lorary` on: what relative imports start at.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (start, node.module) if part)
            # `from lorary import x` imports the room x where there is one, and goes through the door otherwise.
            names = [f"lorary.{alias.name}" for alias in node.names] if module == "lorary" else [module]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "lorary":
                room = name.split(".")[1] if "." in name else "__init__"
                yield node.lineno, room if room in FLOORS else "__init__"


def violations(code: str, room: str, package: tuple[str, ...] = ("lorary",)) -> list[str]:
    found = []
    for line, other in imported_rooms(code, package):
        same_room = other == room or FLOORS[other] == FLOORS[room] == 0
        if not same_room and FLOORS[other] >= FLOORS[room]:
            found.append(f"line {line}: {room} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})")
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{path.name}: the room '{room}' has no floor; give it one in FLOORS and in docs/adr"
    package = ("lorary", *path.relative_to(SOURCE).parts[:-1])
    assert violations(path.read_text(encoding="utf-8"), room, package) == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("ops", "from lorary.library.store import Library"),
        ("ops", "def late():\n    import lorary.cli"),
        ("route", "from lorary.cluster import mbc"),
        ("route", "from ..merge.linear import mean"),
        ("data", "from lorary import ops"),
        ("model", "from lorary import Library"),
        ("library", "import lorary"),
        ("errors", "from lorary import __version__"),
    ],
)
def test_a_made_up_violation_is_found(room: str, code: str) -> None:
    assert len(violations(code, room, ("lorary", room))) == 1


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("route", "from lorary.ops.gram import gram\nfrom lorary.adapter import Adapter"),
        ("route", "from .arrow import arrow_scores\nfrom lorary.route import uniform"),
        ("adapter", "from lorary.errors import ShapeError"),
        ("cli", "from lorary.version import __version__"),
        ("ops", "import torch\nimport lorary_plugins"),
    ],
)
def test_an_import_from_below_or_from_the_same_room_passes(room: str, code: str) -> None:
    assert violations(code, room, ("lorary", room)) == []


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
