"""Evaluating libraries: what is scored, what is scored once, and what becomes of a cell that cannot be scored."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.errors import LibraryError, LoraryError, TaskError, UsageError
from lorary.evaluate import scorer
from lorary.evaluate import seated_base as bench
from lorary.evaluate.answers import RowScores
from lorary.evaluate.cells import BASE
from lorary.evaluate.evaluate_library import evaluate_libraries, evaluate_library, library_names
from lorary.evaluate.evaluation import Evaluation, combine
from lorary.evaluate.references import drawn_anew
from lorary.evaluate.settings import EvaluateSettings
from lorary.library.document import DEFAULT_ROUTER
from lorary.library.prepared import Prepared, expert_key, save_prepared
from lorary.library.store import Library
from lorary.model.base import Base
from lorary.model.fallback import Evidence, save_evidence
from lorary.model.features import last_vectors
from lorary.model.seating import seating
from lorary.route import ROUTERS
from lorary.route.setting import Routing

ROWS = 3
SETTINGS = EvaluateSettings(routers=("arrow", "oracle"), top_k=1, rows=ROWS)


def test_tasks(path: Path, *names: str) -> dict[str, Task]:
    """Tasks with a few test rows, by name."""
    with open(path, "w") as file:
        for name in names:
            for split in ("val", "test"):
                for i in range(4):
                    row = {"task": name, "family": f"f-{name}", "split": split, "source": f"{name} {i} {split}:"}
                    options = ["up", "down"] if name == "b" else []
                    file.write(json.dumps({**row, "target": ["up", "down"][i % 2], "options": options}) + "\n")
    return load_tasks(path)


test_tasks.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def tested(tmp_path: Path) -> dict[str, Task]:
    """Tasks a and b, of which experts know, and c, of which none does."""
    return test_tasks(tmp_path / "tasks.jsonl", "a", "b", "c")


@pytest.fixture
def make_library(
    tmp_path: Path, base: Base, random_adapter: Callable[..., Any], generator: torch.Generator
) -> Callable[..., Library]:
    """A factory of libraries of random experts over the tiny base, one for each task that is named."""

    def make(name: str, *tasks: str, size: float = 1.0) -> Library:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        library = Library.create(tmp_path / name, base.model, base_name="tiny")
        for task in tasks:
            library.add_adapter(random_adapter(base.model, task, generator, size=size), {"tasks": [task]})
        return library

    return make


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks of all calls that score rows."""
    calls: list[str] = []
    real = scorer.score_rows

    def count(model: Any, tokenizer: Any, template: Any, rows: Any, metric: str, **more: Any) -> RowScores:
        calls.append(rows[0].task)
        return real(model, tokenizer, template, rows, metric, **more)

    monkeypatch.setattr(scorer, "score_rows", count)
    return calls


def values(evaluation: Evaluation) -> dict[tuple[str, ...], float]:
    """Every value by library, router, task and metric."""
    return {(c.library, c.router, c.task, c.metric): c.value for c in evaluation.cells}


@pytest.mark.parametrize(
    "changes",
    [
        {"routers": ("arow",)}, {"top_k": 0}, {"temperature": 0.0}, {"rows": 0}, {"routing_rows": -1},
        {"routers": ("arrow[top_k=0]",)}, {"routers": ("arrow[temperature=.5]",)}, {"routers": ("uniform[top_k=2]",)},
        {"routers": ("arrow[preset=nobody]",)}, {"routers": ("lag[per=request]",)},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LoraryError, match="found:"):
        EvaluateSettings(**changes)


def test_a_router_is_given_what_all_are_given_and_its_brackets_win() -> None:
    s = EvaluateSettings(top_k=2, temperature=0.5, route={"input_norm": "unit", "allow": ["a"]}, mix="factors")
    assert s.setting("arrow") == Routing.of(
        "arrow", top_k=2, temperature=0.5, mix="factors", input_norm="unit", allow=["a"]
    )
    assert s.setting("arrow[top_k=3,allow=b]") == Routing.of(
        "arrow", top_k=3, temperature=0.5, mix="factors", input_norm="unit", allow=["b"]
    )
    assert s.setting("uniform[allow=b+c]").allow == ["b", "c"]
    assert s.setting("experts[a+b]") == Routing.of(experts=("a", "b"), mix="factors")
    assert s.setting("contrast[preset=contrast,temperature=0.2]") == Routing.of(
        "contrast", top_k=10_000, temperature=0.2
    )


def test_a_default_threshold_stays_with_its_own_router(
    tmp_path: Path, tiny_base_folder: Path, make_library: Callable[..., Library], tested: dict[str, Task]
) -> None:
    library = make_library("lib", "a", "b")
    library.set_default_router({**DEFAULT_ROUTER, "top_k": 1, "threshold": 0.25, "null": 0.5, "per": "token"})
    asked = {"routers": ("arrow", "norm"), "base": str(tiny_base_folder), "rows": 1, "routing_rows": 0}
    found = lorary.evaluate(str(library.path), str(tmp_path / "tasks.jsonl"), **asked)
    settings = found.settings
    assert settings.setting("arrow") == Routing.of("arrow", top_k=1, threshold=0.25, null=0.5, per="token")
    assert settings.setting("norm") == Routing.of("norm", top_k=1, per="token")
    assert settings.setting("arrow[threshold=0.1]").choosing.threshold == 0.1
    asked |= {"threshold": 0.4, "null": None}  # for all routers, since somebody said so
    settings = lorary.evaluate(str(library.path), str(tmp_path / "tasks.jsonl"), **asked).settings
    assert [settings.setting(router).choosing.threshold for router in ("arrow", "norm")] == [0.4, 0.4]
    assert settings.setting("arrow").choosing.null is None


def test_routers_are_called_by_the_one_way_to_write_them() -> None:
    asked = ("arrow[temperature=0.50,top_k=2]", "base", "arrow[top_k=2,temperature=0.5]")
    assert EvaluateSettings(routers=asked).routers == ("arrow[top_k=2,temperature=0.5]", "base")


def test_routers_in_brackets_are_scored_side_by_side(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    library = make_library("lib", "a", "b")
    routers = ("experts[a]", "experts[b]", "experts[a+b]", "uniform", "arrow[top_k=1]", "arrow[top_k=2]", "oracle")
    found = values(evaluate_library(base, library, tested, replace(SETTINGS, routers=routers)))
    loss = {router: found["lib", router, "a", "loss"] for router in ("base", *routers)}
    assert loss["oracle"] == loss["experts[a]"]
    assert loss["experts[a+b]"] == pytest.approx(loss["uniform"])
    assert len({round(value, 6) for value in loss.values()}) == 6
    assert found["lib", "oracle", "b", "loss"] == found["lib", "experts[b]", "b", "loss"]


def test_libraries_are_scored_in_one_run_the_base_once_and_each_keeps_its_results(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], scored: list[str]
) -> None:
    one, two = make_library("one", "a", "b"), make_library("two", "a", "b", "c")
    both = evaluate_libraries(base, [one, two], tested, SETTINGS)
    assert len(scored) == 3 + 2 * 2 * 3  # base, and two routers of two libraries, on three tasks
    assert both.libraries == ("one", "two")
    for library in ("one", "two"):
        for router in ("base", "arrow", "oracle"):
            tasks = [c.task for c in both.cells if c.primary and (c.library, c.router) == (library, router)]
            assert tasks == ["a", "b", "c"]
    assert {(c.library, c.task): c.split for c in both.cells}["one", "c"] == "held_out"
    assert {(c.library, c.task): c.split for c in both.cells}["two", "c"] == "held_in"
    scored.clear()
    apart = [evaluate_library(base, library, tested, SETTINGS) for library in (two, one)]
    assert scored == []
    assert values(combine(apart)) == values(both)
    assert json.loads(json.dumps(both.to_json(), allow_nan=False))["libraries"] == ["one", "two"]


def test_combined_evaluations_are_those_of_one_run(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    libraries = [make_library("one", "a", "b"), make_library("two", "b", "c")]
    whole = evaluate_libraries(base, libraries, tested, SETTINGS).to_json()
    parts = [evaluate_library(base, library, tested, SETTINGS) for library in libraries]
    assert combine(parts).to_json() == whole
    assert combine([*parts, parts[0]]).to_json() == whole  # a part that is given twice counts once
    by_router = [
        evaluate_library(base, libraries[0], tested, replace(SETTINGS, routers=(router,)))
        for router in ("arrow", "oracle")
    ]
    assert values(combine(by_router)) == values(parts[0])
    across = [c for c in combine(parts).comparisons if c.against_library not in (None, c.library)]
    assert {(c.router, c.against, c.split) for c in across} == {
        (router, router, split) for router in ("arrow", "oracle") for split in ("held_in", "mixed")
    }


def test_evaluations_that_were_asked_otherwise_are_not_combined(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    library = make_library("one", "a")
    parts = [evaluate_library(base, library, tested, replace(SETTINGS, rows=rows)) for rows in (2, 3)]
    with pytest.raises(UsageError, match="share their rows to be combined\nfound: 2 and 3"):
        combine(parts)
    with pytest.raises(UsageError, match="must be an evaluation"):
        combine([])


def test_tasks_of_one_name_and_other_data_are_not_combined(
    base: Base, tested: dict[str, Task], tmp_path: Path, make_library: Callable[..., Library]
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text((tmp_path / "tasks.jsonl").read_text().replace("down", "left"))
    one = evaluate_library(base, make_library("one", "a"), {"a": tested["a"]}, SETTINGS)
    two = evaluate_library(base, make_library("two", "a"), load_tasks(path, names=["a"]), SETTINGS)
    with pytest.raises(TaskError, match=r"task 'a' to be combined\nfound: other data with library 'one' .* 'two'"):
        combine([one, two])


def test_two_libraries_of_one_name_are_not_taken_for_one(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    parts = [
        evaluate_library(base, make_library(f"{parent}/lib", "a"), {"a": tested["a"]}, SETTINGS) for parent in "xy"
    ]
    with pytest.raises(UsageError, match="must agree on a cell that both hold: lib, arrow, a, loss"):
        combine(parts)


def test_libraries_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    assert library_names([tmp_path / "x" / "lib", tmp_path / "y" / "lib"]) == ["x/lib", "y/lib"]
    assert library_names([tmp_path / "x" / "lib", tmp_path / "y"]) == ["lib", "y"]
    for paths in ([], [tmp_path, tmp_path]):
        with pytest.raises(UsageError, match="each of them once"):
            library_names(paths)


def test_a_router_that_cannot_run_fails_its_own_cells_and_is_said_once(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, routers=("centroid", "experts[nobody]", "arrow"))
    found = evaluate_library(base, make_library("lib", "a", "b"), tested, settings)
    failed = {(f.router, f.task): f for f in found.failures}
    assert set(failed) == {(router, task) for router in ("centroid", "experts[nobody]") for task in "abc"}
    assert "prepared" in failed["centroid", "a"].rule
    assert failed["centroid", "a"].remedy
    assert {c.router for c in found.cells} == {"base", "arrow"}
    with pytest.raises(LoraryError, match=r"6 of 12 cells could not be scored, the first of them lib, centroid, a"):
        found.check()
    assert capsys.readouterr().err.count("failed: lib, centroid") == 1


@pytest.mark.parametrize("task", ["a", "b"])  # an answer that is generated, and options that are ranked
def test_logits_that_are_no_numbers_never_become_a_score(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], task: str
) -> None:
    library = make_library("lib", "a", "b", size=1e38)
    found = evaluate_library(base, library, {task: tested[task]}, replace(SETTINGS, routers=("arrow",)))
    assert {c.router for c in found.cells} == {"base"}
    (failure,) = found.failures
    assert (failure.router, failure.task) == ("arrow", task)
    assert re.search(r"logits that are numbers|must give numbers below 1e\+16", failure.rule)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_failed_cell_is_tried_again_and_the_others_are_not(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], scored: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    library, real = make_library("lib", "a", "b"), scorer.score_rows

    def no_memory(*args: Any, **more: Any) -> RowScores:
        if args[3][0].task == "b":
            raise torch.OutOfMemoryError("no memory left\nand more words")
        return real(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(scorer, "score_rows", no_memory)
        first = evaluate_library(base, library, tested, SETTINGS)
    assert [(f.router, f.task, f.found) for f in first.failures] == [
        (router, "b", "no memory left") for router in ("base", "arrow", "oracle")
    ]
    assert {c.task for c in first.comparisons and first.cells} == {"a", "c"}
    scored.clear()
    assert evaluate_library(base, library, tested, SETTINGS).failures == []
    assert scored == ["b"] * 3


def test_another_base_is_scored_anew_though_its_fingerprint_is_the_same(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], scored: list[str]
) -> None:
    library, only = make_library("lib", "a"), {"a": tested["a"]}
    evaluate_library(base, library, only, SETTINGS)
    assert len(scored) == 3
    norm = base.model.model.norm.weight
    with torch.no_grad():
        norm *= 3
    try:
        evaluate_library(base, library, only, SETTINGS)
        assert len(scored) == 6
    finally:
        with torch.no_grad():
            norm /= 3


def test_experts_that_change_while_they_are_evaluated_are_refused(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, real = make_library("lib", "a", "b"), bench.attach

    def replaced(*args: Any, **more: Any) -> Any:
        library.remove("b")
        return real(*args, **more)

    monkeypatch.setattr(bench, "attach", replaced)
    with pytest.raises(LibraryError, match="must stay as they are while it is evaluated"):
        evaluate_library(base, library, tested, SETTINGS)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a system prompt is needed') }}", "{% for", {"tool_use": "x"}],
    ids=["it raises", "no template", "none for plain talk"],
)  # fmt: skip
def test_a_chat_template_that_takes_no_message_leaves_the_plain_one(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], template: Any
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = template
    with pytest.warns(UserWarning, match="left out in the template chat: the base model's chat template must take"):
        found = evaluate_library(
            replace(base, tokenizer=tokenizer), make_library("lib", "a"), {"a": tested["a"]}, SETTINGS
        )
    assert found.failures == []
    assert {c.template for c in found.cells if c.primary} == {"plain"}


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "DefaultCPUAll"),
    ],
)
def test_memory_that_runs_out_on_the_cpu_fails_a_cell_and_other_errors_end_the_run(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch,
    error: Exception, found: str,
) -> None:  # fmt: skip
    library, raised = make_library("lib", "a"), error

    def fail(*args: Any, **more: Any) -> RowScores:
        raise raised

    monkeypatch.setattr(scorer, "score_rows", fail)
    first, *_ = evaluate_library(base, library, {"a": tested["a"]}, SETTINGS).failures
    assert first.found is not None
    assert first.found.startswith(found)
    raised = RuntimeError("another one")
    with pytest.raises(RuntimeError, match="another one"):
        evaluate_library(base, library, {"a": tested["a"]}, SETTINGS)


def test_a_base_whose_own_template_cannot_be_scored_counts_in_the_other(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    head = "a system prompt of many words, which alone is longer than a row may be; "
    tokenizer.chat_template = f"{head}{{% for m in messages %}}{{{{ m['content'] }}}}{{% endfor %}}"
    settings = replace(SETTINGS, routers=("arrow",), max_length=40)
    with pytest.warns(UserWarning, match="task 'a': the base is left out in the template chat: max_length must be"):
        found = evaluate_library(
            replace(base, tokenizer=tokenizer), make_library("lib", "a"), {"a": tested["a"]}, settings
        )
    assert found.failures == []
    assert [(c.router, c.template) for c in found.cells if c.primary] == [("base", "plain"), ("arrow", "plain")]


CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture
def chatting(base: Base) -> Base:
    """The tiny base with a chat template."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = CHAT
    return replace(base, tokenizer=tokenizer)


@pytest.fixture
def templates_scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Split and template of all calls that score rows; chat is right on test rows, and plain on all others."""
    calls: list[tuple[str, str]] = []

    def fake(model: Any, tokenizer: Any, template: Any, rows: Any, metric: Any, **more: Any) -> RowScores:
        split, count = rows[0].split, len(rows)
        calls.append((split, template.name))
        right = float((template.name == "chat") == (split == "test"))
        return RowScores([2.0 - right] * count, metric.name, [right] * count, [""] * count)

    monkeypatch.setattr(scorer, "score_rows", fake)
    return calls


def test_the_base_counts_in_the_template_that_validation_rows_choose_whatever_test_rows_say(
    chatting: Base, tested: dict[str, Task], make_library: Callable[..., Library],
    templates_scored: list[tuple[str, str]],
) -> None:  # fmt: skip
    library, settings = make_library("lib", "a", "b"), replace(SETTINGS, routing_rows=0)
    found = evaluate_library(chatting, library, tested, settings)
    assert {(c.task, c.template, c.value) for c in found.cells if c.router == "base" and c.primary} == {
        (task, "plain", 0.0) for task in "abc"
    }
    assert {(t.task, t.template, t.split, t.rows, t.origin) for t in found.base_templates} == {
        (task, "plain", "val", 4, "rows") for task in "abc"
    }
    means = {mean.router: mean.mean for mean in found.means if mean.split == "held_in"}
    assert (means["base"], means["base (plain)"], means["base (chat)"]) == (0.0, 0.0, 1.0)
    losses = {mean.router: mean.mean for mean in found.loss_means if mean.split == "held_in"}
    assert (losses["base"], losses["base (plain)"], losses["base (chat)"]) == (2.0, 2.0, 1.0)
    # Other rows to choose on make no cell anew, and the same ones nothing at all.
    templates_scored.clear()
    fewer = evaluate_library(chatting, library, tested, replace(settings, template_rows=2))
    assert templates_scored == [("val", name) for _ in "abc" for name in ("plain", "chat")]
    assert {choice.rows for choice in fewer.base_templates} == {2}
    templates_scored.clear()
    evaluate_library(chatting, library, tested, settings)
    assert templates_scored == []


def test_tasks_without_rows_to_choose_on_follow_the_majority(
    chatting: Base, tested: dict[str, Task], make_library: Callable[..., Library],
    templates_scored: list[tuple[str, str]],
) -> None:  # fmt: skip
    def only(name: str, *splits: str) -> Task:
        train = tuple(replace(row, split="train") for row in tested[name].split("val"))
        rows = {**tested[name].rows, "train": train}
        return replace(tested[name], rows={split: rows[split] for split in (*splits, "test")})

    library = make_library("lib", "a")
    settings = replace(SETTINGS, routers=("arrow",), routing_rows=0)
    tasks = {"a": only("a", "val"), "b": only("b", "train"), "c": only("c")}
    found = evaluate_library(chatting, library, tasks, settings)
    assert [(t.task, t.split, t.origin, t.template) for t in found.base_templates] == [
        ("a", "val", "rows", "plain"), ("b", "train", "rows", "plain"), ("c", "", "majority", "plain"),
    ]  # fmt: skip
    alone = evaluate_library(chatting, library, {"c": only("c")}, settings)
    assert [(t.origin, t.template) for t in alone.base_templates] == [("default", "chat")]
    assert {c.template for c in alone.cells if c.router == "base" and c.primary} == {"chat"}
    # Together with others, the choice is made anew.
    whole = combine([alone, evaluate_library(chatting, library, {"a": only("a", "val")}, settings)])
    assert {c.template for c in whole.cells if c.router == "base" and c.primary} == {"plain"}


def test_a_scored_cell_whose_routing_cannot_be_looked_at_is_no_failure(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, only = make_library("lib", "a", "b"), {"a": tested["a"]}

    def no_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr(scorer, "look_at_routing", no_memory)
        with pytest.warns(UserWarning, match=r"lib, arrow, a: scored, .* no memory left"):
            first = evaluate_library(base, library, only, SETTINGS)
    first.check()
    assert first.routing == []
    assert {c.router for c in first.cells if c.primary} == {"base", "arrow", "oracle"}
    # It is tried again, and two runs together have all that either has.
    again = evaluate_library(base, library, only, SETTINGS)
    assert combine([first, again]).routing == again.routing != []


def test_a_task_without_test_rows_is_a_failure(
    base: Base, tmp_path: Path, make_library: Callable[..., Library]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"task": "a", "split": "train", "source": "x", "target": "y"}))
    found = evaluate_library(base, make_library("lib", "a"), load_tasks(path), SETTINGS)
    assert [f.rule for f in found.failures] == ["task 'a' must have test rows to be evaluated on"] * 3
    assert found.cells == []
    assert found.comparisons == []


def test_another_base_than_the_librarys_ends_the_run(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(LoraryError, match="base"):
        evaluate_library(replace(base, model=tiny_model(seed=9)), make_library("lib", "a"), tested, SETTINGS)


def test_results_that_cannot_be_written_end_the_run(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    library = make_library("lib", "a")
    (library.path / "results").write_text("a file in the way")
    with pytest.raises(LibraryError, match="results must be"):
        evaluate_library(base, library, tested, SETTINGS)


def test_a_cell_says_what_it_cost(base: Base, tested: dict[str, Task], make_library: Callable[..., Library]) -> None:
    cells = evaluate_library(base, make_library("lib", "a"), tested, SETTINGS).cells
    assert all(c.seconds > 0 for c in cells)
    assert all(c.peak_bytes is None or c.peak_bytes > 50_000_000 for c in cells)  # Python and torch alone are more


def test_routing_accuracy_is_the_share_of_the_tasks_own_expert(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], scored: list[str]
) -> None:
    library = make_library("lib", "a", "b")
    routers = ("arrow[allow=a]", "arrow", "uniform", "oracle", "experts[a]")
    settings = replace(SETTINGS, routers=routers, top_k=2, routing_rows=2)
    first = evaluate_library(base, library, tested, settings)
    found = {(r.router, r.task): r for r in first.routing}
    # Held-in tasks alone, and routers that choose alone; b may not be chosen by the first of them.
    assert set(found) == {("arrow[allow=a]", "a"), ("arrow", "a"), ("arrow", "b")}
    only = found["arrow[allow=a]", "a"]
    assert (only.share, only.top1, only.chance, only.rows, only.expert) == (1.0, 1.0, 1.0, 2, "a")
    assert found["arrow", "a"].chance == 0.5
    assert 0 < found["arrow", "a"].share < 1
    # Where prompts go is known of all tasks; what an expert gets there is what its accuracy says, and the rest is b's.
    usage = {(u.router, u.task): u for u in first.routing_usage}
    assert set(usage) == {(router, task) for router in ("arrow[allow=a]", "arrow") for task in tested}
    assert usage["arrow[allow=a]", "c"].usage == {"a": 1.0}
    assert usage["arrow[allow=a]", "c"].strongest == [("a", 1.0)] * 2
    assert usage["arrow", "a"].usage["a"] == pytest.approx(found["arrow", "a"].share, abs=1e-4)
    assert sum(usage["arrow", "a"].usage.values()) == pytest.approx(1, abs=2e-4)
    scored.clear()
    again = evaluate_library(base, library, tested, settings)
    assert (again.routing, again.routing_usage) == (first.routing, first.routing_usage)
    assert evaluate_library(base, library, tested, replace(settings, routing_rows=0)).routing == []


def with_prompts(library: Library, width: int) -> None:
    """Prompts of every expert around a vector of its own, unlike the hidden states of any prompt."""
    for number, name in enumerate(library.names()):
        draw = torch.Generator().manual_seed(number)
        vectors = torch.randn(width, generator=draw) + 0.1 * torch.randn(8, width, generator=draw)
        save_prepared(library, "samples_early", expert_key(library, name), Prepared({"request": vectors}, {}, {}))


def test_rows_that_fit_no_expert_are_asked_of_the_base_in_its_own_template(
    base: Base, make_library: Callable[..., Library], tested: dict[str, Task]
) -> None:
    library = make_library("lib", "a", "b", "c")
    with_prompts(library, base.model.config.hidden_size)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "user: {% for m in messages %}{{ m['content'] }}{% endfor %} bot:"
    chatting = replace(base, tokenizer=tokenizer)
    settings = replace(SETTINGS, routers=("auto", "auto[fallback=uniform]", "auto[threshold=-999.5]", "uniform"))
    evaluation = evaluate_library(chatting, library, tested, settings)
    assert not evaluation.failures
    for task in tested:
        cells = {(c.router, c.template, c.metric): c for c in evaluation.cells if c.task == task}
        lost, as_base = cells["auto", "plain", "loss"], cells["base", "chat", "loss"]
        fallen = cells["auto[fallback=uniform]", "plain", "loss"]
        # The base answers freely, and is not asked to rank the options of task b.
        assert lost.base_rows == (0 if task == "b" else ROWS)
        assert lost.values == pytest.approx((fallen if task == "b" else as_base).values)
        assert (fallen.base_rows, fallen.values) == (0, pytest.approx(cells["uniform", "plain", "loss"].values))
        kept = cells["auto[threshold=-999.5]", "plain", "loss"]
        assert kept.base_rows == 0
        assert kept.values != pytest.approx(as_base.values)
    # Rows that are in that template already are the base's, too.
    in_chat = evaluate_library(chatting, library, tested, replace(settings, routers=("auto",), template="chat"))
    cells = {(c.router, c.task, c.metric): c for c in in_chat.cells if c.template == "chat"}
    for task in ("a", "c"):
        assert cells["auto", task, "loss"].base_rows == ROWS
        assert cells["auto", task, "loss"].values == pytest.approx(cells["base", task, "loss"].values)
    # Evidence that the mean of all experts does better on such prompts is followed, and asks for other scores.
    template = make_template("plain", tokenizer, max_length=99)
    prompts = [template.encode_prompt(row.prompt) for task in tested.values() for row in task.split("test")]
    vectors = last_vectors(base.model, prompts)
    save_evidence(library, Evidence(vectors, torch.ones(len(vectors))), {})
    again = evaluate_library(chatting, library, tested, settings)
    for task in tested:
        cells = {(c.router, c.template, c.metric): c for c in again.cells if c.task == task}
        auto, uniform = cells["auto", "plain", "loss"], cells["uniform", "plain", "loss"]
        assert (auto.base_rows, auto.values) == (0, pytest.approx(uniform.values))


def test_answers_are_kept_with_the_rows_and_cells_without_them_are_read_as_they_are(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], scored: list[str]
) -> None:
    library = make_library("lib", "a", "b")
    first = evaluate_library(base, library, tested, SETTINGS)
    for cell in first.cells:
        assert len(cell.answers) == (ROWS if cell.metric in ("em", "acc") else 0)
    rows = first.to_json()["rows"]
    assert [row["prompt"] for row in rows["a"]] == [f"a {i} test:" for i in range(ROWS)]
    for cell in first.cells:
        if cell.metric == "acc":
            right = [float(answer in row["references"]) for answer, row in zip(cell.answers, rows["b"], strict=True)]
            assert cell.values == right
    path = library.path / "results" / "evaluation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    for line in lines:
        for cell in line["value"] if isinstance(line["value"], list) else ():
            del cell["answers"]
    path.write_text("\n".join(map(json.dumps, lines)))
    scored.clear()
    again = evaluate_library(base, library, tested, SETTINGS)
    assert scored == []
    assert again.cells == [replace(cell, answers=[]) for cell in first.cells]


def test_the_oracle_of_a_held_out_task_is_the_expert_of_the_lowest_loss_that_is_recorded(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    settings = replace(SETTINGS, routers=("experts[a]", "experts[b]", "oracle"))
    found = evaluate_library(base, make_library("lib", "a", "b"), tested, settings)
    (entry,) = found.expert_losses
    assert (entry.task, entry.split, entry.rows, set(entry.losses)) == ("c", "val", 4, {"a", "b"})
    (expert,) = {cell.expert for cell in found.cells if (cell.router, cell.task) == ("oracle", "c")}
    assert expert == min(entry.losses, key=lambda name: entry.losses[name])


def test_the_best_single_expert_is_that_of_the_lowest_mean_loss_over_all_tasks(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    only = {name: replace(tested[name], rows={"test": tested[name].split("test")}) for name in "abc"}
    settings = replace(SETTINGS, routers=("experts[a]", "experts[b]", "best-single"), rows=4, routing_rows=0)
    found = evaluate_library(base, make_library("lib", "a", "b"), only, settings)
    # The rows by which it is chosen are the test rows here, so that cells have the same losses.
    losses = {name: sum(c.value for c in found.cells if (c.router, c.metric) == (f"experts[{name}]", "loss"))
              for name in "ab"}  # fmt: skip
    best = min(losses, key=lambda name: losses[name])
    assert {c.expert for c in found.cells if c.router == "best-single"} == {best}
    assert sum(c.value for c in found.cells if (c.router, c.metric) == ("best-single", "loss")) == losses[best]
    assert found.expert_losses == []


def test_an_oracle_may_take_the_base_on_a_held_out_task_where_it_does_better_on_validation_rows(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    better = BASE

    def fake(model: Any, tokenizer: Any, template: Any, rows: Any, metric: Any, **more: Any) -> RowScores:
        router = BASE if seating(model).routing == Routing(BASE) else "expert"
        right, count = float((router == better) == (rows[0].split == "val")), len(rows)
        return RowScores([1.0] * count, metric.name, [right] * count, [""] * count)

    monkeypatch.setattr(scorer, "score_rows", fake)
    settings = replace(SETTINGS, routers=("oracle", "oracle-or-base"), routing_rows=0)
    found = evaluate_library(base, make_library("lib", "a", "b"), tested, settings)
    used = {(c.router, c.task): c.expert for c in found.cells if c.primary}
    assert [used["oracle-or-base", task] for task in "abc"] == ["a", "b", BASE]
    assert used["oracle", "c"] in ("a", "b")
    # What the test rows say chooses nothing.
    assert values(found)["lib", "oracle-or-base", "c", "em"] == values(found)["lib", "base", "c", "em"] == 0.0
    assert len(found.expert_losses) == 1
    better = "expert"
    other = evaluate_library(base, make_library("lib2", "a", "b"), tested, settings)
    used = {(c.router, c.task): c.expert for c in other.cells if c.primary}
    assert used["oracle-or-base", "c"] == used["oracle", "c"] != BASE


def test_the_random_control_has_the_norms_of_the_expert_and_leaves_it_as_it_was(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library]
) -> None:
    library, only = make_library("lib", "a", "b"), {"a": tested["a"]}
    settings = replace(SETTINGS, routers=("random", "experts[a]"), routing_rows=0)
    found = values(evaluate_library(base, library, only, settings))
    assert found["lib", "random", "a", "loss"] != found["lib", "experts[a]", "a", "loss"]
    model = lorary.attach(base.model, library, router="base")
    try:
        state = seating(model)
        layer = next(iter(state.layers.values()))
        before = layer.lora.up.clone()
        with drawn_anew(model, "a"):
            seat = layer.experts.index(state.experts.index("a"))
            ranks = layer.rank_index(seat)
            assert layer.lora.up[ranks].norm() == pytest.approx(before[ranks].norm().item())
            assert not torch.allclose(layer.lora.up[ranks], before[ranks])
            rest = [i for i in range(len(before)) if not ranks.start <= i < ranks.stop]
            assert torch.equal(layer.lora.up[rest], before[rest])
        assert torch.equal(layer.lora.up, before)
    finally:
        lorary.detach(model)


def test_another_edition_of_a_rule_is_scored_anew_and_so_is_a_rule_that_may_pick_it(
    base: Base, tested: dict[str, Task], make_library: Callable[..., Library], scored: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    library, only = make_library("lib", "a", "b"), {"a": tested["a"]}
    settings = replace(SETTINGS, routers=("arrow", "auto", "uniform", "experts[a]"), routing_rows=0)
    evaluate_library(base, library, only, settings)
    scored.clear()

    def evaluated(rule: str) -> int:
        monkeypatch.setitem(ROUTERS, rule, replace(ROUTERS[rule], edition=2))
        scored.clear()
        assert evaluate_library(base, library, only, settings).failures == []
        return len(scored)

    assert evaluated("norm") == 0
    assert evaluated("arrow") == 1
    assert evaluated("contrast") >= 1  # auto alone, which may score its groups of rows apart
    assert evaluated("arrow") == 0
    assert Routing.of("auto").editions == {"contrast": 2}
    assert Routing.of(experts=["a"]).editions == {}
