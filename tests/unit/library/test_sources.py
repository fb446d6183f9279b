"""Which adapters a path stands for, and what becomes of those that cannot go in."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import write_adapter

from lorary.adapter import Adapter, LoraFactors
from lorary.errors import AdapterError, LibraryError, UsageError
from lorary.formats.peft_config import new_config
from lorary.library.sources import adapter_folders
from lorary.library.store import Library
from lorary.recipes.add import run_add

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make("runs/a")`: a folder with an adapter."""

    def at(place: str, width: int = 32) -> Path:
        factors = LoraFactors(torch.ones(2, width), torch.ones(32, 2), 2.0)
        config = new_config(None, rank=2, alpha=4, target_modules=[LAYER])
        write_adapter(Adapter(Path(place).name, {LAYER: factors}, config), tmp_path / place)
        return tmp_path / place

    return at


def test_a_folder_of_adapters_and_a_pattern_stand_for_each_of_them(make: Callable[..., Path], tmp_path: Path) -> None:
    a, b = make("runs/a"), make("runs/b")
    (tmp_path / "runs/logs").mkdir()
    assert adapter_folders([str(tmp_path / "runs")]) == [a, b]
    assert adapter_folders([str(tmp_path / "ru*/[ab]")]) == [a, b]
    assert adapter_folders([str(b), str(tmp_path / "runs"), str(b)]) == [b, a]


def test_a_folder_whose_name_is_a_pattern_is_taken_as_it_is(make: Callable[..., Path]) -> None:
    folder = make("runs/a[1]")
    assert adapter_folders([str(folder)]) == [folder]


def test_a_pattern_without_a_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a pattern must match"):
        adapter_folders([str(tmp_path / "none*")])


def test_adapters_inside_an_adapter_are_left_out_and_it_is_said(make: Callable[..., Path]) -> None:
    outer = make("run")
    make("run/checkpoint-5")
    with pytest.warns(UserWarning, match="checkpoint-5"):
        assert adapter_folders([str(outer)]) == [outer]


def test_a_library_stands_for_its_adapters(make: Callable[..., Path], tmp_path: Path, tiny_base_folder: Path) -> None:
    library = Library.create(tmp_path / "old", tiny_base_folder)
    library.add(make("a"), tasks=["x", "y"])
    result = run_add(str(tmp_path / "new"), [str(library.path)], base=str(tiny_base_folder))
    assert result.added == ["a"]
    assert Library.open(tmp_path / "new").provenance("a")["tasks"] == ["x", "y"]


def test_good_adapters_go_in_and_each_bad_one_is_named(
    make: Callable[..., Path], tmp_path: Path, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, wide, empty = make("good"), make("wide", width=48), tmp_path / "empty"
    empty.mkdir()
    result = run_add(str(tmp_path / "lib"), [str(good), str(wide), str(empty)], base=str(tiny_base_folder))
    assert result.added == ["good"]
    assert [(Path(f.path).name, bool(f.rule)) for f in result.failed] == [("wide", True), ("empty", True)]
    assert Library.open(tmp_path / "lib").names() == ["good"]
    said = capsys.readouterr().err
    assert f"not added: {wide}" in said
    assert f"not added: {empty}" in said


def test_where_none_fits_no_library_is_left(make: Callable[..., Path], tmp_path: Path, tiny_base_folder: Path) -> None:
    paths = [str(make("wide", width=48)), str(make("wider", width=64))]
    with pytest.raises(LibraryError, match="at least one of 2 adapters"):
        run_add(str(tmp_path / "lib"), paths, base=str(tiny_base_folder))
    with pytest.raises(AdapterError, match="wide"):
        run_add(str(tmp_path / "lib"), paths[:1], base=str(tiny_base_folder))
    assert not (tmp_path / "lib").exists()


def test_two_folders_of_one_name_are_told_apart_by_hand(
    make: Callable[..., Path], tmp_path: Path, tiny_base_folder: Path
) -> None:
    paths = [str(make("one/a")), str(make("two/a"))]
    result = run_add(str(tmp_path / "lib"), paths, base=str(tiny_base_folder))
    assert result.added == ["a"]
    assert "'a' is the name of two folders" in result.failed[0].rule
    assert str(result.failed[0].remedy).endswith(f"{paths[1]} --name OTHER")
    assert run_add(str(tmp_path / "lib"), paths[1:], name="b").added == ["b"]


def test_tasks_are_recorded_by_name(make: Callable[..., Path], tmp_path: Path, tiny_base_folder: Path) -> None:
    paths, library = [str(make("a")), str(make("b"))], str(tmp_path / "lib")
    run_add(library, paths, base=str(tiny_base_folder), tasks={"a": ["sst2", "trec"]})
    opened = Library.open(library)
    assert [opened.provenance(name)["tasks"] for name in ("a", "b")] == [["sst2", "trec"], []]
    with pytest.raises(UsageError, match=r"adapters that are added\nfound: c"):
        run_add(library, paths, tasks={"c": ["x"]})
    with pytest.raises(UsageError, match="tasks as a list of names"):
        opened.add(paths[0], "c", tasks="sst2")


def test_a_name_is_for_one_adapter_and_a_new_library_needs_a_base(make: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(make("runs/a"), tmp_path / "runs/b")
    with pytest.raises(UsageError, match=r"--name is for one adapter\nfound: 2 adapters"):
        run_add(str(tmp_path / "lib"), [str(tmp_path / "runs")], name="x", base="embedded")
    with pytest.raises(LibraryError, match=r"nothing is there\nremedy: --base MODEL"):
        run_add(str(tmp_path / "lib"), [str(tmp_path / "runs")])
