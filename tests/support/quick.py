"""Which tests a day's work asks for: `python tests/support/quick.py` prints them, for `make quick`.

A file `src/lorary/ROOM/NAME.py` that differs from the last commit asks for `tests/unit/ROOM/test_NAME.py`; where it has
none, for the tests of the room that import it, or for all of them. A changed test asks for itself. The tests of the
house and the floors always run.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ALWAYS = ("tests/test_floors.py", "tests/test_house.py", "tests/unit/route", "tests/unit/merge")


def changed_files(root: Path) -> list[str]:
    """Paths that differ from the last commit, new files too."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=all"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line[3:].split(" -> ")[-1] for line in listed.splitlines()]


def tests_of(path: str, root: Path) -> list[str]:
    """The tests that a changed file asks for, of those that are there."""
    parts = Path(path).parts
    if parts[:2] == ("src", "lorary") and path.endswith(".py"):
        room = Path("tests/unit", *parts[2:-1])
        if (root / room / f"test_{parts[-1]}").exists():
            return [f"{room}/test_{parts[-1]}"]
        if room == Path("tests/unit") or not (root / room).exists():
            return []
        module = re.compile(rf"\b{re.escape('.'.join(parts[1:])[:-3])}\b")
        tests = sorted((root / room).glob("test_*.py"))
        importing = [f"{room}/{test.name}" for test in tests if module.search(test.read_text(encoding="utf-8"))]
        return importing or [str(room)]
    is_test = parts[0] == "tests" and parts[-1].startswith("test_") and (root / path).exists()
    return [path] if is_test else []


def chosen(paths: Iterable[str], root: Path) -> list[str]:
    """All tests to run, each once: those that always run, then what each changed file asks for."""
    return list(dict.fromkeys([*ALWAYS, *(test for path in paths for test in tests_of(path, root))]))


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[2]
    sys.stdout.write(" ".join(chosen(changed_files(here), here)) + "\n")
