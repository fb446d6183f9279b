"""Routers from the command line: every field, in every command that takes a router, and a library's own default."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run

from lorary.cli.route import route_fields
from lorary.errors import UsageError
from lorary.library.document import DEFAULT_ROUTER, check_router
from lorary.library.store import Library
from lorary.route.setting import Routing


@pytest.fixture
def library(
    tmp_path: Path, tiny_base_folder: Path, tiny_model: Any, random_adapter: Any, generator: torch.Generator
) -> Path:
    """Three experts."""
    opened = Library.create(tmp_path / "lib", tiny_base_folder)
    for name in "abc":
        opened.add_adapter(random_adapter(tiny_model(), name, generator), {"tasks": [name]})
    return opened.path


def test_values_are_json_where_they_read_as_such_and_names_have_commas() -> None:
    route = ["top-p=0.9", "per=request", "calibrated=true", "threshold=null", "at=model.layers.0.self_attn.q_proj"]
    assert route_fields(route) == {
        "top_p": 0.9, "per": "request", "calibrated": True, "threshold": None, "at": "model.layers.0.self_attn.q_proj",
    }  # fmt: skip
    assert route_fields(["allow=a, 1st"], top_k=2, mix=None) == {"allow": ["a", "1st"], "top_k": 2}
    assert route_fields(['experts={"a": 0.5}', 'temperature={"0": 2}', 'general=["a,b"]']) == {
        "experts": {"a": 0.5}, "temperature": {"0": 2}, "general": ["a,b"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("top_p", r"must be FIELD=VALUE\nfound: top_p"),
        ("topp=0.9", r"must name a field of a routing setting\nfound: topp\nremedy: one of \['preset', 'router'"),
        ("top_k=2", r"'top_k' must be given once"),
        ("router=null", "router must have a value"),
    ],
)
def test_what_cannot_be_a_field_is_refused_by_name(route: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        route_fields([route], top_k=3)


def test_a_library_keeps_every_field_of_a_setting() -> None:
    for field, value in Routing().fields().items():
        check_router({**DEFAULT_ROUTER, field: value})


def test_the_default_router_is_shown_changed_and_used(library: Path, run: Run) -> None:
    assert json.loads(run("library", "router", library, "--json").out) == dict(DEFAULT_ROUTER)
    before = (library / "library.json").read_bytes()
    assert run("library", "router", library).out.split()[:4] == ["router", "arrow", "top_k", "4"]
    assert (library / "library.json").read_bytes() == before

    changed = run(
        "library", "router", library, "--route", "router=norm", "--route", "allow=a,c", "--route", "top_p=0.9"
    )
    assert changed.code == 0, changed.err
    assert 'allow            ["a", "c"]' in changed.out
    kept = {"router": "norm", "top_k": 4, "temperature": 1.0, "mix": "outputs", "top_p": 0.9, "allow": ["a", "c"]}
    assert Library.open(library).default_router == kept
    answer = json.loads(run("generate", library, "--prompt", "say", "--max-new-tokens", 2, "--json").out)
    assert (answer["router"], answer["usage"]["b"]) == ("norm", 0)
    other = run("generate", library, "--prompt", "say", "--max-new-tokens", 2, "--json", "--route", "allow=null")
    assert json.loads(other.out)["usage"]["b"] > 0

    run("library", "router", library, "--route", "top_p=null")
    assert "top_p" not in Library.open(library).default_router
    run("library", "router", library, "--reset", "--route", "top_k=2")
    assert Library.open(library).default_router == {**DEFAULT_ROUTER, "top_k": 2}


@pytest.mark.parametrize(
    ("route", "code", "message"),
    [
        ("router=arow", 1, "a router must exist\nfound: arow"),
        ("allow=a,z", 1, "must be in the library\nfound: ['z']"),
        ("top_p=2.0", 2, "top_p must be above 0"),
        ("preset=papers", 2, "a routing preset must exist"),
    ],
)
def test_a_default_that_could_not_run_is_refused_and_changes_nothing(
    library: Path, run: Run, route: str, code: int, message: str
) -> None:
    before = (library / "library.json").read_bytes()
    outcome = run("library", "router", library, "--route", route)
    assert outcome.code == code
    assert message in outcome.err
    assert (library / "library.json").read_bytes() == before


def test_an_answer_takes_any_field_and_a_preset(library: Path, run: Run) -> None:
    def usage(*route: str) -> Any:
        outcome = run(
            "generate", library, "--prompt", "say", "--max-new-tokens", 2, "--json",
            *(part for one in route for part in ("--route", one)),
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)["usage"]

    assert max(usage("router=logo", "top_k=1").values()) == pytest.approx(1)
    assert sum(usage("preset=paper-2024", "top_k=2").values()) == pytest.approx(1)
    without = usage("general=b", "scale=unit")
    assert without == pytest.approx({"a": 1, "b": 0, "c": 1})
    twice = run("generate", library, "--prompt", "say", "--top-k", 1, "--route", "top_k=2")
    assert (twice.code, "'top_k' must be given once" in twice.err) == (2, True)


def test_an_evaluation_scores_routers_under_any_field(library: Path, run: Run, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    rows = [
        {"task": "a", "split": "test", "source": f"say {i}:", "target": "up", "options": ["up", "down"]}
        for i in range(3)
    ]
    tasks.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    def values(*arguments: str) -> Any:
        outcome = run("evaluate", library, tasks, "--routers", "norm,uniform", "--json", *arguments)
        assert outcome.code == 0, outcome.err
        document = json.loads(outcome.out)
        cells = {cell["router"]: cell["value"] for cell in document["cells"] if cell["metric"] == "loss"}
        return cells, document["settings"]

    plain, _ = values()
    asked, settings = values("--route", "allow=a", "--route", "top_p=0.5")
    assert settings["route"] == {"allow": ["a"], "top_p": 0.5}
    assert asked["norm"] == pytest.approx(asked["uniform"])  # one expert is left, in full
    assert asked["norm"] != pytest.approx(plain["norm"])
    run("library", "router", library, "--route", "allow=a", "--route", "router=norm", "--route", "top_p=0.5")
    assert values()[0] == asked
    for route, message in (("experts=a", "names its routers by --routers"), ("calibrated=true", "must be prepared")):
        outcome = run("evaluate", library, tasks, "--routers", "norm", "--route", route)
        assert outcome.code != 0
        assert message in outcome.err
