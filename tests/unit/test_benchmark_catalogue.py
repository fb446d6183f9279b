"""The benchmark of large libraries, over a small one and without its times."""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import catalogue

    return catalogue


def test_its_library_is_whole_and_each_case_runs(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[object]] = []
    monkeypatch.setattr(script, "commanded", lambda arguments, _: (asked.append(arguments(0)), (0.0, 0.0))[1])
    rows = script.measure(tmp_path, 40, 1)
    assert {row["figure"] for row in rows} == {"time", "processor time"}
    assert len({row["case"] for row in rows}) == 13
    assert [command[0] for command in asked] == ["ls", "nearest", "add", "--help"]
    library = script.Library.open(tmp_path / "library")
    assert len(library) == 42
    assert library.verify() == []
    assert 1_500 < (tmp_path / "library/adapters/adapter-00000/provenance.json").stat().st_size < 5_000
