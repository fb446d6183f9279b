"""`make quick` runs the tests that a change asks for."""

from pathlib import Path

from quick import ALWAYS, chosen

ROOT = Path(__file__).parents[2]


def test_a_changed_file_asks_for_its_mirror_or_for_its_room() -> None:
    changed = ["src/lorary/ops/choose.py", "src/lorary/ops/growable.py", "src/lorary/data/chat.py", "docs/cost.md"]
    tests = chosen(changed, ROOT)
    assert tests[: len(ALWAYS)] == list(ALWAYS)
    assert tests[len(ALWAYS) :] == [
        "tests/unit/ops/test_choose.py",
        "tests/unit/ops/test_growable.py",
        "tests/unit/data",
    ]


def test_a_changed_test_asks_for_itself_once() -> None:
    test = "tests/unit/test_keys.py"
    assert chosen([test, test, "tests/unit/test_that_is_gone.py"], ROOT) == [*ALWAYS, test]
