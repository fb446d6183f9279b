"""A dry run knows a base by its configuration alone, and refuses what would fail after hours."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lorary.errors import BaseModelError, LoraryError, UsageError
from lorary.recipes.reproduce import StageChoice, run_dry_run
from lorary.study.dry_run import dry_run_text


@pytest.mark.parametrize(
    ("study", "parameters", "expert"),
    [
        # The published numbers of parameters; an expert of rank 4: 32 layers of (d_in + d_out) summed over its targets.
        ("paper-phi2", 2_779_683_840, 4 * 32 * 4 * (2560 + 2560)),
        ("paper-mistral", 7_241_732_096, 4 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024))),
    ],
)
def test_the_papers_studies_fit_the_real_configurations(study: str, parameters: int, expert: int) -> None:
    found = run_dry_run(study)
    assert found["base"]["parameters"] == parameters
    rows = {row["stage"]: row for row in found["stages"]}
    assert rows["build:joint"]["parameters"] == expert
    assert rows["build:private"]["parameters"] == 256 * expert
    # 8,000 rows, 16 a step: five passes, three for clusters of the same rows.
    assert rows["build:private"]["steps"] == 256 * 5 * 500
    assert rows["build:mbc"]["steps"] == 256 * 3 * 500
    assert any("not looked up" in note for note in found["assumed"])
    assert "hours" in dry_run_text(found)


def test_a_dry_run_counts_what_is_there_and_writes_nothing(make_study: Callable[..., Path], tmp_path: Path) -> None:
    found = run_dry_run(str(make_study()), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    rows = {row["stage"]: row for row in found["stages"]}
    assert (rows["build:private"]["experts"], rows["build:private"]["steps"]) == (4, 12)
    assert (rows["build:mbc"]["experts"], rows["build:mbc"]["steps"]) == (2, 6)
    assert rows["evaluate:main"]["tokens"] > 0
    assert found["totals"]["steps"] == sum(row["steps"] for row in rows.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("rank: 2", "rank: 2, target_modules: [query]"), "every target module must name linear layers"),
        (("rank: 2", "rank: 2, upper_layers: 9"), "upper_layers must be at most 2"),
        (("k: 2, private", "k: 9, private"), "at most as many clusters as tasks"),
        (("of: private, tasks: 2", "of: private, tasks: 9"), "must have between 1 and 4 tasks"),
        (("library: private, methods", "library: private, tasks: [alpha], methods"), "must have held-out tasks with"),
    ],
)
def test_what_would_fail_later_is_refused_now(
    change: tuple[str, str], match: str, make_study: Callable[..., Path]
) -> None:
    path = make_study(change)
    with pytest.raises(LoraryError, match=match):
        run_dry_run(str(path), choice=StageChoice(("build", "adapt")))


def test_a_base_that_is_here_is_looked_at_whatever_the_study_assumes(make_study: Callable[..., Path]) -> None:
    path = make_study(("about: All", "assume: {model: {model_type: gpt2}}\nabout: All"))
    found = run_dry_run(str(path), choice=StageChoice(("build:private",)))
    assert (found["base"]["architecture"], found["base"]["assumed"]) == ("LlamaForCausalLM", False)


@pytest.mark.parametrize("base", ["./nowhere", "nobody/nothing", "nobody/nothing@main"])
def test_a_base_that_is_neither_here_nor_described_is_refused_without_the_network(
    base: str, make_study: Callable[..., Path], tiny_base_folder: Path
) -> None:
    path = make_study((f"base: {tiny_base_folder}", f"base: {base}"))
    with pytest.raises(BaseModelError, match=f"neither, for '{base}'"):
        run_dry_run(str(path), choice=StageChoice(("build:private",)))


def test_tasks_whose_place_is_left_open_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs the folder of its tasks.*\n.*no --tasks\n.*LORARY_TASKS"):
        run_dry_run("suite-cpu")
    with pytest.raises(UsageError, match=r"must be|on this machine"):
        run_dry_run("suite-cpu", tasks=str(tmp_path / "nowhere"))
