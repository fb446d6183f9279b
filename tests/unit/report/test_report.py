"""The report page: what it says, that it asks nothing of a network, and that no text of it can become code."""

import base64
import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import LEVELS as LEVELS_MADE_UP
from evaluations import made_up
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from pages import Page

from lorary.errors import ShapeError, UsageError
from lorary.evaluate.cells import Cell
from lorary.evaluate.routed_prompt import RoutedPrompt
from lorary.evaluate.summary import CellSummary
from lorary.report.contents import Report, Similarity
from lorary.report.evaluation_page import render_report, write_report
from lorary.report.headline import guard_box, headline
from lorary.report.markup import script_json
from lorary.report.plots import family_order, similarity_plot
from lorary.report.shell import part
from lorary.report.table import score_table
from lorary.report.table_model import ScoreTable
from lorary.report.traces import routing_plot

ATTACK = "</script><img src=x onerror=alert(1)>\"'&<!--\u2028"

FAMILIES = {
    "arithmetic": ["add_numbers", "larger_number"],
    "dates": ["month_of_date", "weekday_or_weekend"],
    "facts": ["animal_class", "capital_city"],
    "sentences": ["question_type", "sentiment"],
    "strings": ["last_word", "surname_first"],
    "units": ["short_unit", "unit_quantity"],
}
HELD_OUT = {"arithmetic": "even_or_odd", "dates": "next_month", "facts": "continent", "strings": "first_letter"}
LEVELS = {"base": 0.35, "uniform": 0.48, "arrow": 0.72, "oracle": 0.8}
PROMPT = "Add 17 and 25, then name the capital city of France:"


def make_cells(rng: np.random.Generator, family: str, task: str, split: str) -> list[dict[str, Any]]:
    cells = []
    for router, level in LEVELS.items():
        drop = 0.15 if split == "held_out" and router != "base" else 0.0
        templates = ["plain", "chat"] if router == "base" else ["plain"]
        values = [float(np.round(np.clip(rng.normal(level - drop, 0.15), 0, 1) * 40) / 40) for _ in templates]
        for template, value in zip(templates, values, strict=True):
            half = 1.96 * (value * (1 - value) / 40) ** 0.5
            shared = {
                "library": "demo", "router": router, "task": task, "family": family, "split": split, "n": 40,
                "seconds": 1.5, "template": template, "expert": task if router == "oracle" else None,
            }  # fmt: skip
            metric = "acc" if family == "sentences" else "em"
            scores = {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}
            scores["values"] = [1.0] * round(40 * value) + [0.0] * round(40 * (1 - value))
            loss = {"value": 2.6 - 2 * value, "low": 2.4 - 2 * value, "high": 2.8 - 2 * value}
            loss["values"] = [2.6 - 2 * value] * 40
            cells.append({**shared, "metric": metric, "primary": value == max(values), **scores})
            cells.append({**shared, "metric": "loss", "primary": False, **loss})
    return cells


def make_evaluation() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    cells = [c for family, tasks in FAMILIES.items() for t in tasks for c in make_cells(rng, family, t, "held_in")]
    cells += [c for family, task in HELD_OUT.items() for c in make_cells(rng, family, task, "held_out")]
    summary = CellSummary([Cell(**cell) for cell in cells])
    return {
        "library": "demo",
        "base": "tiny",
        "settings": {},
        "cells": cells,
        "means": list(map(asdict, summary.means())),
        "family_means": list(map(asdict, summary.family_means())),
        "loss_means": list(map(asdict, summary.loss_means())),
        "comparisons": list(map(asdict, summary.comparisons())),
        "base_guard": summary.base_guard(),
    }


def make_similarity(families: dict[str, list[str]]) -> Similarity:
    names = [name for tasks in families.values() for name in tasks]
    family = {name: key for key, tasks in families.items() for name in tasks}
    noise = torch.randn(len(names), len(names), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.03
    same = torch.tensor([[0.3 if family[a] == family[b] else 0.04 for b in names] for a in names], dtype=torch.float64)
    cosine = (same + (noise + noise.T) / 2).fill_diagonal_(1.0)
    shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(2)).tolist()
    return Similarity([names[i] for i in shuffled], family, cosine[shuffled][:, shuffled])


def make_routing(experts: list[str], prompt: str = PROMPT, layers: int = 10, top_k: int = 4) -> RoutedPrompt:
    tokens = re.findall(r"\s?\S{1,4}", prompt)
    paths = [
        f"model.layers.{depth}.{kind}" for depth in range(20, 20 + layers)
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]  # fmt: skip
    drawn = torch.randn(len(paths), len(tokens), len(experts), generator=torch.Generator().manual_seed(3)) * 0.8
    half = len(tokens) // 2
    drawn[:, :half, experts.index(sorted(experts)[0])] += 2
    drawn[:, half:, experts.index(sorted(experts)[-1])] += 2
    values, ids = drawn.topk(min(top_k, len(experts)), dim=-1)
    weights = torch.zeros_like(drawn).scatter_(-1, ids, values.softmax(-1))
    return RoutedPrompt(prompt, " 42, Paris", tokens, paths, experts, weights)


def make_report() -> Report:
    names = [name for tasks in FAMILIES.values() for name in tasks]
    return Report(
        title="Lorary demo: twelve experts over one base model",
        facts={
            "base model": "embedded (SmolLM2-135M-Instruct)", "library": "demo, 12 experts of rank 4",
            "router": "arrow, top 4, temperature 1", "template": "plain", "training": "150 steps, rate 0.01",
        },
        evaluation=make_evaluation(),
        similarity=make_similarity(FAMILIES),
        routings=[make_routing(names), make_routing(names, "Is 'What a lovely day' a question?\nAnswer:")],
        losses={name: (2.4 + 0.2 * (i % 5), 0.3 + 0.24 * (i % 9)) for i, name in enumerate(names)},
        versions={"lorary": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render_report(report))


def test_the_headline_gives_the_means_of_every_router_on_both_splits(page: Page, report: Report) -> None:
    board = ScoreTable(report.evaluation or {})
    for router in LEVELS:
        for split in ("held_in", "held_out"):
            values = [c["value"] for c in report.cells if c["primary"] and (c["router"], c["split"]) == (router, split)]
            mean = board.mean(router, split)
            assert mean is not None
            assert mean.value == pytest.approx(sum(values) / len(values))
            assert f"{100 * mean.value:.1f}" in page.text
    assert "On the 12 held-in tasks arrow scores" in page.text
    assert "On the 4 held-out tasks arrow scores" in page.text


def test_the_sections_are_linked_in_reading_order(page: Page) -> None:
    order = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert order == ["result", "table", "heat", "families", "similarity", "routing", "losses", "reading"]
    assert [attrs["href"] for tag, attrs in page.elements if tag == "a"] == [f"#{key}" for key in order]


def test_a_task_that_a_router_failed_on_is_in_no_mean_and_is_named() -> None:
    board = ScoreTable(made_up(failed=True, lacks=("arrow", "in0")).to_json())
    means = [board.mean(router, "held_in") for router in board.routers]
    assert [mean and mean.tasks for mean in means] == [4] * len(LEVELS_MADE_UP)
    assert [mean and mean.tasks for mean in (board.mean_loss(name, "held_in") for name in board.routers)] == [4] * 6
    page = Page(render_report(Report("lib", evaluation=made_up(failed=True, lacks=("arrow", "in0")).to_json()))).text
    assert "In no mean, comparison or gap: in0 (failed: arrow)." in page
    assert "over 4 of them" in page
    assert "On the 4 held-in tasks arrow scores" in page


def test_the_headline_speaks_of_the_best_router_of_each_split() -> None:
    evaluation = made_up().to_json()
    for mean in evaluation["means"]:
        if (mean["router"], mean["split"]) == ("uniform", "held_out"):
            mean["mean"] = 0.99
        elif (mean["router"], mean["split"]) == ("base", "held_in"):
            mean["mean"] = 0.95
    lead = Page(headline(ScoreTable(evaluation))).text
    assert "On the 5 held-in tasks arrow scores" in lead
    assert "No router reaches the base. On the 1 held-out task uniform scores 99.0" in lead
    assert {"arrow − base", "uniform − base"} <= set(
        re.findall(r'<th scope="row">([^<]+)<', headline(ScoreTable(evaluation)))
    )


def test_nothing_is_best_where_all_score_alike() -> None:
    evaluation = made_up().to_json()
    for cell in evaluation["cells"]:
        cell["value"] = 0.5
    assert 'class="best' not in score_table(ScoreTable(evaluation), dict.fromkeys(["family0", "family1", "other"], 0),
                                            losses=False)  # fmt: skip


def test_a_difference_is_found_whichever_way_round_the_evaluation_has_it() -> None:
    entry = {"router": "uniform", "against": "arrow", "split": "held_in", "difference": -0.2, "low": -0.3, "high": -0.1}
    board = ScoreTable({"cells": [], "comparisons": [{**entry, "tasks": 3}]})
    assert board.difference("arrow", "uniform", "held_in") == (0.2, 0.1, 0.3, 3, None, None, 0.0, 0.0)
    assert board.difference("arrow", "uniform", "held_out") is None


@pytest.mark.parametrize(
    ("low", "high", "wide", "verdict"),
    [
        (0.1, 0.3, (0.05, 0.4), "better"), (-0.3, -0.1, (-0.4, -0.05), "worse"),
        (0.1, 0.3, (-0.1, 0.4), "better on these tasks"), (-0.3, -0.1, (None, None), "worse on these tasks"),
        (-0.1, 0.1, (0.01, 0.2), "no clear difference"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_intervals(
    report: Report, low: float, high: float, wide: tuple[float | None, float | None], verdict: str
) -> None:
    entry = {"router": "arrow", "against": "base", "split": "held_in", "difference": (low + high) / 2, "tasks": 12}
    entry |= {"tasks_low": wide[0], "tasks_high": wide[1]}
    evaluation = {**(report.evaluation or {}), "comparisons": [{**entry, "low": low, "high": high}]}
    html = headline(ScoreTable(evaluation))
    assert re.findall(r'class="verdict \w+">([^<]+)<', html) == [verdict]


def test_the_base_guard_names_every_task_on_which_the_base_wins(report: Report) -> None:
    board = ScoreTable(report.evaluation or {})
    assert board.guard
    box = guard_box(board)
    for router in ("uniform", "arrow", "oracle"):
        group = re.search(rf"(?s)<summary>base beats <em>{router}</em>.*?</details>", box)
        expected = {entry["task"] for entry in board.guard if entry["router"] == router}
        assert set(re.findall(r"<li>(?:<b>)?(\w+)", group[0] if group else "")) == expected


def test_a_base_without_a_score_is_not_said_to_beat_no_router(report: Report) -> None:
    evaluation = report.evaluation or {}
    cells = [cell for cell in evaluation["cells"] if cell["router"] != "base"]
    box = guard_box(ScoreTable({**evaluation, "cells": cells, "base_guard": []}))
    assert "the base has no score" in box
    assert "clear" not in box


def test_an_empty_base_guard_says_so(report: Report) -> None:
    box = guard_box(ScoreTable({**(report.evaluation or {}), "base_guard": []}))
    assert "On no task does the base alone do better" in box


def test_the_table_marks_the_best_router_but_never_the_oracle_and_names_the_base_template(report: Report) -> None:
    source = render_report(replace(report, similarity=None, routings=(), losses={}))
    scores = re.search(r'(?s)<table class="results scores">.*?</table>', source)
    assert scores is not None
    rows = [row for row in re.findall(r"(?s)<tr.*?</tr>", scores[0]) if "<td" in row and 'class="mean"' not in row]
    assert len(rows) == 16
    for row in rows:
        cells = re.findall(r'<td class="([^"]*)"[^>]*><b>([\d.]+)</b>', row)
        values = [float(value) for _, value in cells]
        assert [i for i, (kind, _) in enumerate(cells) if "best" in kind] == [
            i for i, value in enumerate(values[:3]) if value == max(values[:3])
        ]
        task = re.search(r'class="task[^"]*">(\w+)', row)
        assert task is not None
        template = next(c["template"] for c in report.cells if c["primary"] and c["task"] == task[1])
        assert f'<span class="tag">{template}</span>' in row


def test_rows_of_the_similarity_are_ordered_by_family_then_name_and_keep_their_values() -> None:
    similarity = make_similarity(FAMILIES)
    drawn = similarity_plot(similarity)
    assert drawn["names"] == [name for family in sorted(FAMILIES) for name in sorted(FAMILIES[family])]
    assert [(b["family"], b["end"] - b["start"]) for b in drawn["blocks"]] == [(f, 2) for f in sorted(FAMILIES)]
    values = np.frombuffer(base64.b64decode(drawn["cosine"]), dtype="<i2").reshape(12, 12) / drawn["parts"]
    order = family_order(similarity)
    np.testing.assert_allclose(values, similarity.cosine[order][:, order].numpy(), atol=1e-4)


def test_a_packed_trace_gives_back_the_routing_weights() -> None:
    routed = make_routing(["a", "b", "c", "d", "e", "f"])
    packed = routing_plot(routed)
    assert packed["kinds"] == ["all", "self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    assert packed["depths"] == ["all", *map(str, range(20, 30))]
    ids = np.frombuffer(base64.b64decode(packed["ids"]), dtype="<u2").reshape(-1, len(routed.tokens), 4)
    weights = np.frombuffer(base64.b64decode(packed["weights"]), dtype="<u1").reshape(ids.shape) / 255
    spread = np.frombuffer(base64.b64decode(packed["spread"]), dtype="<u2").reshape(ids.shape[:2]) / 100
    usage = np.frombuffer(base64.b64decode(packed["usage"]), dtype="<u2").reshape(-1, 6) / 10_000
    for layer, path in enumerate(routed.layers):
        kind, depth = path.split(".", 3)[3], path.split(".")[2]
        view = packed["views"][packed["kinds"].index(kind)][packed["depths"].index(depth)]
        full = np.zeros((len(routed.tokens), 6))
        np.put_along_axis(full, ids[view].astype(int), weights[view], axis=1)
        own = routed.weights[layer].double().numpy()
        np.testing.assert_allclose(full, own, atol=0.5 / 255 + 1e-6)
        entropy = -(own * np.log(np.where(own > 0, own, 1))).sum(axis=1)
        np.testing.assert_allclose(spread[view], np.exp(entropy), atol=0.01)
    np.testing.assert_allclose(usage[packed["views"][0][0]], routed.weights.mean(dim=(0, 1)).numpy(), atol=1e-4)


def test_a_module_that_is_missing_at_some_depth_has_no_view_there() -> None:
    layers = ["model.layers.0.a", "model.layers.1.a", "model.layers.1.b"]
    packed = routing_plot(RoutedPrompt("p", "a", ["t"], layers, ["x", "y"], torch.full((3, 1, 2), 0.5)))
    assert packed["kinds"] == ["all", "a", "b"]
    assert packed["views"][2][packed["depths"].index("0")] is None
    assert packed["views"][2][packed["depths"].index("1")] is not None


def test_the_page_can_load_nothing(page: Page) -> None:
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert not {"src", "srcset", "action", "background"} & set(attrs)
        assert (attrs.get("href") or "#").startswith("#")
    policy = next(a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_the_policy_lets_exactly_the_script_of_the_page_run(page: Page) -> None:
    policy = next(a["content"] or "" for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    _, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy


def attacked(report: Report) -> Report:
    """The same report with every text of it replaced by an attack; markers keep names apart."""
    evaluation = json.loads(json.dumps(report.evaluation), object_hook=_attack_cell)
    names = [f"{i}{ATTACK}" for i in range(3)]
    weights = torch.full((2, 3, 3), 1 / 3)
    routed = RoutedPrompt(ATTACK, ATTACK, [ATTACK] * 3, [f"{ATTACK}.0.{ATTACK}", ATTACK], names, weights)
    return Report(
        title=ATTACK, facts={ATTACK: ATTACK}, evaluation=evaluation,
        similarity=Similarity(names, dict.fromkeys(names, ATTACK), torch.eye(3)), routings=[routed],
        losses=dict.fromkeys(names, (1.0, 2.0)), versions={ATTACK: ATTACK},
    )  # fmt: skip


def _attack_cell(document: dict[str, Any]) -> dict[str, Any]:
    fields = ("task", "family", "router", "against", "library", "template", "expert", "metric")
    return {k: f"{v}{ATTACK}" if k in fields and v not in ("base", "loss") else v for k, v in document.items()}


def test_no_text_can_become_markup(page: Page, report: Report) -> None:
    hostile = Page(render_report(attacked(report)))
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in page.elements}
    assert len(hostile.scripts) == len(page.scripts) == 2
    assert hostile.scripts[1] == page.scripts[1]
    assert not any(name.startswith("on") for _, attrs in hostile.elements for name in attrs)
    assert hostile.text.count("<img src=x onerror=alert(1)>") > 50
    assert json.loads(hostile.scripts[0])["routings"][0]["prompt"] == ATTACK


def test_a_template_escapes_its_values_and_refuses_a_name_that_is_missing() -> None:
    assert 'id="plot-a&#34;&lt;b&gt;\\x1b"' in part("parts.html", "plot", 'a"<b>\x1b', "label")
    with pytest.raises(UndefinedError, match="label"):
        part("parts.html", "plot", "a")


@given(st.text())
def test_json_in_a_script_gives_the_text_back_and_cannot_end_the_script(value: str) -> None:
    encoded = script_json({"value": value})
    assert json.loads(encoded) == {"value": value}
    assert not set("<>&\u2028\u2029") & set(encoded)


@pytest.mark.parametrize("name", ["evaluation", "similarity", "routings", "losses"])
def test_a_section_without_contents_is_left_out(report: Report, name: str) -> None:
    empty: Any = {"routings": (), "losses": {}}.get(name)
    sections = {"evaluation": "table", "routings": "routing"}
    source = render_report(replace(report, **{name: empty}))
    assert f'<section id="{sections.get(name, name)}">' not in source
    assert source.count("<section ") == (4 if name == "evaluation" else 7)


def test_a_report_of_nothing_but_a_title_is_a_page() -> None:
    page = Page(render_report(Report("Empty")))
    assert "Empty" in page.text


def test_an_old_report_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, Report("New \ud800"))
    assert "<title>New &#55296;</title>" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("place", ["missing/report.html", "file/report.html", "."])
def test_a_report_that_cannot_be_written_is_refused_by_name(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / place))):
        write_report(tmp_path / place, Report("New"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="one row per name"):
        Similarity(["a"], {}, torch.eye(2))
    with pytest.raises(UsageError, match=r"cosine[\s\S]*nan"):
        Similarity(["a", "b"], {}, torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(ShapeError, match=r"\(1, 1, 2\)"):
        RoutedPrompt("p", "a", ["t"], ["l.0.q"], ["x", "y"], torch.ones(2, 1, 2))
    with pytest.raises(UsageError, match=r"0\.\.1[\s\S]*1\.5"):
        RoutedPrompt("p", "a", ["t"], ["l.0.q"], ["x"], torch.full((1, 1, 1), 1.5))
    with pytest.raises(UsageError, match="expert 'x' must be finite"):
        Report("New", losses={"x": (1.0, float("nan"))})


def test_a_large_library_keeps_the_page_small() -> None:
    names = [f"expert_{i:03}" for i in range(256)]
    families = {f"family_{i}": names[i::16] for i in range(16)}
    routed = make_routing(names, prompt="word " * 200, layers=70)
    assert (len(routed.layers), len(routed.tokens)) == (210, 200)
    everything = Report("Large", similarity=make_similarity(families), routings=[routed])
    assert len(render_report(everything)) - len(render_report(Report("Large"))) < 1_600_000
