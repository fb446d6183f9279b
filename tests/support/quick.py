"""Which tests a day's work asks for: `python tests/support/quick.py` prints them, for `make quick`.

A file `src/lorary/ROOM/NAME.py` that differs from the last commit asks for `tests/unit/ROOM/test_NAME.py`, or for all
tests of the room where it has none; a changed test asks for itself. The tests of the house and the floors always run.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ALWAYS = ("tests/test_floors.py", "tests/test_house.py", "tests/unit/route", "tests/unit/merge")


def changed_files(root: Path) -> list[str]:
    """Paths that differ from the last commit, new files too."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=all"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line[3:].split(" -> ")[-1] for line in listed.splitlines()]


def tests_of(path: str, root: Path) -> Iterator[str]:
    """The tests that a changed file asks for, of those that are there."""
    parts = Path(path).parts
    if parts[:2] == ("src", "lorary") and path.endswith(".py"):
        room = Path("tests/unit", *parts[2:-1])
        mirror = room / f"test_{parts[-1]}"
        yield from (str(place) for place in (mirror, room) if (root / place).exists() and place != Path("tests/unit"))
    elif parts[0] == "tests" and parts[-1].startswith("test_") and (root / path).exists():
        yield path


def chosen(paths: Iterable[str], root: Path) -> list[str]:
    """All tests to run, each once: those that always run, then the first choice for each changed file."""
    first = [next(tests_of(path, root), None) for path in paths]
    return list(dict.fromkeys([*ALWAYS, *(test for test in first if test is not None)]))


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[2]
    sys.stdout.write(" ".join(chosen(changed_files(here), here)) + "\n")
