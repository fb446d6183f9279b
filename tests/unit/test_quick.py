"""`make quick` runs the tests that a change asks for."""

from pathlib import Path

from quick import ALWAYS, chosen

ROOT = Path(__file__).parents[2]


def test_a_changed_file_asks_for_its_mirror_for_those_that_import_it_or_for_its_room(tmp_path: Path) -> None:
    (tmp_path / "tests/unit/ops").mkdir(parents=True)
    texts = {"choose": "", "some": "from lorary.ops.kernel import x", "more": "import lorary.ops.kernels"}
    for name, text in texts.items():
        (tmp_path / f"tests/unit/ops/test_{name}.py").write_text(text)
    changed = ["src/lorary/ops/choose.py", "src/lorary/ops/kernel.py", "docs/cost.md", "src/lorary/nowhere/x.py"]
    tests = chosen(changed, tmp_path)
    assert tests[: len(ALWAYS)] == list(ALWAYS)
    assert tests[len(ALWAYS) :] == ["tests/unit/ops/test_choose.py", "tests/unit/ops/test_some.py"]
    assert chosen(["src/lorary/ops/alone.py"], tmp_path)[len(ALWAYS) :] == ["tests/unit/ops"]


def test_what_always_runs_is_there() -> None:
    assert [test for test in ALWAYS if not (ROOT / test).exists()] == []


def test_a_changed_test_asks_for_itself_once() -> None:
    test = "tests/unit/test_keys.py"
    assert chosen([test, test, "tests/unit/test_that_is_gone.py"], ROOT) == [*ALWAYS, test]
