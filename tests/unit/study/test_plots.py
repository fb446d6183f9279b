"""Pictures of a study follow from its numbers, and its page has a place for each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM
from browser import drawn as drawn_page

from lorary.recipes.reproduce import run_reproduce
from lorary.route.setting import Routing
from lorary.study.plots import answer_plots, study_plots, sweep


def column(library: str, router: str, value: float, setting: dict[str, Any] | None, split: str = "held_in") -> Any:
    return {"library": library, "router": router, "split": split, "stage": "evaluate:main", "value": value,
            "low": value - 0.05, "high": value + 0.05, "tasks": 4, "rows": 80, "setting": setting,
            "asked": "the same"}  # fmt: skip


def document(**top_k: int) -> dict[str, Any]:
    """A library of 8 experts under Arrow with several top-k, and one of 3 and one of 20 under Arrow as it is."""
    arrow = Routing("arrow").to_json()
    columns = [
        column("lib", "base", 0.1, None),
        column("lib", "oracle", 0.9, None),
        column("lib", "arrow", 0.4, arrow),
        *(column("lib", name, 0.1 * k, {**arrow, "top_k": k}) for name, k in top_k.items()),
        column("lib", "arrow[temperature=2]", 0.3, {**arrow, "temperature": 2}),
        column("small", "arrow", 0.35, arrow),
        column("large", "arrow", 0.45, arrow),
        column("joint", "arrow", 0.5, arrow),
    ]
    experts = {"lib": 8, "small": 3, "large": 20, "joint": 1}
    methods = {"lib": "private", "small": "subset", "large": "private", "joint": "joint"}
    libraries = [{"library": name, "experts": count, "ranks": [4], "method": methods[name], "clustered_by": None}
                 for name, count in experts.items()]  # fmt: skip
    return {"columns": columns, "libraries": libraries, "cells": [], "answers": []}


def compared(*cells: str, against: str = "lib/arrow") -> list[dict[str, Any]]:
    return [
        {"cell": cell, "against": against, "split": "held_in", "difference": 0.1, "low": 0.05, "high": 0.2,
         "tasks_low": None, "tasks_high": None, "verdict": "ahead", "stages": []}
        for cell in cells
    ]  # fmt: skip


def test_cells_that_differ_in_one_number_are_a_sweep_in_its_order() -> None:
    found = sweep(document(few=2, many=16), compared("lib/many", "lib/few"))
    assert found is not None
    assert (found["field"], found["title"]) == ("top_k", "top_k of arrow")
    (line,) = found["lines"]
    assert [point[:2] for point in line["points"]] == [["2", 20.0], ["4", 40.0], ["16", 160.0]]
    assert {(level["router"], level["mean"]) for level in found["levels"]} == {("base", 10.0), ("oracle", 90.0)}


def test_libraries_that_differ_in_their_experts_are_a_sweep_and_have_no_oracle_in_common() -> None:
    found = sweep(document(), compared("small/arrow", "large/arrow"))
    assert found is not None
    assert found["title"] == "experts in the library"
    assert [point[0] for point in found["lines"][0]["points"]] == ["3", "8", "20"]
    assert {level["router"] for level in found["levels"]} <= {"base"}


@pytest.mark.parametrize(
    "cells",
    [
        ("lib/few",),
        ("lib/few", "lib/arrow[temperature=2]"),
        ("small/arrow", "lib/few"),
        ("lib/few", "lib/base"),
        ("small/arrow", "joint/arrow"),
        ("lib/few", "lib/many", "lib/more"),
    ],
    ids=["two values", "two settings", "library and setting", "no setting", "another method", "a value twice"],
)
def test_what_differs_in_more_than_one_number_is_no_sweep(cells: tuple[str, ...]) -> None:
    assert sweep(document(few=2, many=2, more=8), compared(*cells)) is None


def test_settings_that_no_axis_has_are_no_sweep() -> None:
    found = document(few=2, many=16)
    for row in found["columns"]:
        if row["router"] in ("few", "many"):
            row["setting"] = {**Routing("arrow").to_json(), "allow": [row["router"]], "temperature": {"q_proj": 1.0}}
    assert sweep(found, compared("lib/few", "lib/many")) is None


def test_means_over_other_tasks_make_no_line() -> None:
    found = document()
    for row in found["columns"]:
        row["asked"] = row["library"]
    assert sweep(found, compared("small/arrow", "large/arrow")) is None


def test_the_map_of_tasks_holds_no_rows_against_more_of_them() -> None:
    def cell(router: str, n: int, value: float) -> dict[str, Any]:
        return {"library": "lib", "router": router, "task": "a", "family": "f", "split": "held_in", "metric": "em",
                "template": "plain", "n": n, "value": value, "low": value, "high": value, "primary": True}  # fmt: skip

    found = document()
    found["cells"] = [cell("base", 2, 0.0), cell("base", 4, 0.5), cell("arrow", 4, 0.75), cell("uniform", 2, 1.0)]
    (row,) = study_plots(found)["heat"]["rows"]
    assert row["gains"] == [0.0, 25.0]


def test_each_kind_of_answer_has_its_picture() -> None:
    rows = [
        *compared("small/arrow"),
        {
            "cell": "lib/arrow",
            "gap_to": "joint/arrow",
            "split": "held_in",
            "closed": 0.5,
            "low": 0.25,
            "high": 0.75,
            "stages": [],
        },
        {"library": "lib", "against": "small", "by_layer": {"10": 0.5, "9": 0.25}, "stages": []},
    ]
    differences, gaps, drift = answer_plots(document(), {"rows": rows})
    (line,) = differences["lines"]
    assert line["points"] == [{"split": "held-in", "verdict": "ahead", "rows": [10.0, 5.0, 20.0], "tasks": None}]
    assert gaps["panels"] == [{"name": "held-in", "routers": ["lib/arrow"], "points": [[50.0, 25.0, 75.0]]}]
    assert gaps["whole"] == "joint/arrow"
    assert drift["lines"] == [{"name": "lib and small", "layers": [9, 10], "values": [0.25, 0.5]}]
    assert answer_plots(document(), {"rows": []}) == []


def test_the_base_stands_once_and_first_and_the_cells_of_a_library_together() -> None:
    plots = study_plots(document(few=2))
    assert [line["name"] for line in plots["columns"]["lines"]][:3] == ["base", "lib: oracle", "lib: arrow"]
    assert plots["columns"]["splits"] == ["held-in"]


def test_a_base_on_other_tasks_stands_apart() -> None:
    found = document()
    other = {**column("small", "base", 0.1, None), "asked": "else"}
    found["columns"] += [other, column("large", "base", 0.1, None)]
    names = [line["name"] for line in study_plots(found)["columns"]["lines"]]
    assert [name for name in names if name.endswith("base")] == ["base", "small: base"]


def test_the_page_has_a_place_for_each_picture_and_stays_small(make_study: Callable[..., Path], tmp_path: Path) -> None:
    path, page = str(make_study()), tmp_path / "out" / "report.html"
    run_reproduce(path, str(tmp_path / "out"))
    drawn = page.read_text()
    for identifier in ("plot-columns", "plot-heat", "plot-answer-0-0", "plot-answer-3-0"):
        assert f'id="{identifier}"' in drawn
    assert len(drawn) < 200_000
    assert "mbc/arrow" in drawn
    if CHROMIUM:
        assert drawn_page(page).count("<svg") > 4
