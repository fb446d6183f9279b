"""A study's file is read into stages, or refused by place, value and remedy."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lorary.errors import LibraryError, LoraryError, UsageError
from lorary.study.config import BuildStage, EvaluateStage, identity
from lorary.study.parse import SHIPPED, parse_study, read_study

MINIMAL = "tasks: {train: {reference: builtin}}\nstages: [{build: private}]"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_study_that_comes_with_lorary_is_read(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert study.about
    assert study.questions


def test_stages_stand_in_the_order_of_the_file(make_study: Callable[..., Path]) -> None:
    study = read_study(str(make_study()))
    assert [identity(stage) for stage in study.stages] == [
        "build:private", "build:mbc", "evaluate:main", "build:part", "build:other", "drift:seed", "adapt:few",
    ]  # fmt: skip
    assert study.name == "study"


def test_a_library_takes_the_settings_of_all_and_its_own_over_them(make_study: Callable[..., Path]) -> None:
    study = read_study(str(make_study(("train: {seed: 1}", "train: {epochs: 2, rank: 3}"))))
    stage = study.stage("build:other")
    assert isinstance(stage, BuildStage)
    settings = stage.settings
    # YAML itself takes 2e-2 for a text.
    assert (settings.steps, settings.epochs, settings.rank, settings.learning_rate) == (None, 2.0, 3, 0.02)


def test_routers_and_cells_are_kept_the_one_way_to_write_them(make_study: Callable[..., Path]) -> None:
    study = read_study(str(make_study(
        ("[arrow, oracle]", '["arrow[ temperature=0.50, top_k=2 ]", oracle]'),
        ("[[mbc/arrow, private/arrow]]", '[["mbc/arrow[top_k=2,temperature=0.500]", private/oracle]]'),
        ("cells: [private/arrow]", "cells: [private/base]"),
    )))  # fmt: skip
    stage = study.stage("evaluate:main")
    assert isinstance(stage, EvaluateStage)
    assert stage.routers[0] == "arrow[top_k=2,temperature=0.5]"
    assert study.questions[0].comparisons() == [("mbc/arrow[top_k=2,temperature=0.5]", "private/oracle")]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("base:", "bases:"), "known keys only\nfound: bases\nremedy: did you mean base"),
        (("routing_rows: 1", "routing_row: 1"), "study 'study', evaluate, .* known keys only\nfound: routing_row"),
        (("train: {reference", "train: {name: x, reference"), "tasks.train must have no name"),
        (("held_out: {reference", "held_out: {name: ' ', reference"), "name must say something"),
        (("rank: 2", "rank: two"), "study 'study', train, key 'rank', must be a whole number"),
        (("train: {seed: 1}", "train: {sed: 1}"), r"stages\[4\] \(build: other\), train, must have known keys only"),
        (("rank: 2", "rank: -2"), "--rank must be above 0"),
        (("k: 2, private", "k: yes, private"), "must be a whole number or null\nfound: True"),
        (("method: mbc, k: 2, private: private", "method: joint, k: 2"), "--k needs --method mbc"),
        (("private: private", "private: nobody"), "build:mbc must name libraries that an earlier stage builds"),
        (("[private, mbc], routers", "[private, other], routers"), "evaluate:main must name libraries that an earlier"),
        (("routers: [arrow, oracle]", "routers: [arrows, oracle]"), "a router must exist\nfound: arrows"),
        (("routers: [arrow, oracle], ", ""), "must say routers"),
        (("held_in: 4, held_out: 4", "held_in: 0"), "must score rows"),
        (("build: other", "build: private"), "a name of its own\nfound: build:private, twice"),
        (("build: other", "construct: other"), "must have one of the keys build, evaluate, adapt, drift"),
        (("of: private, ", ""), "'of' belongs to method subset"),
        (("mbc/arrow", "mbc/norm"), "must name cells that some stage scores\nfound: mbc/norm"),
        (("mbc/arrow", "mbc"), "a cell .* must be LIBRARY/ROUTER\nfound: mbc"),
        (("share_of: private/oracle", "base_wins: false"), "must say what it asks"),
        (("held_in: 4, held_out: 4", "held_in: 4, held_out: -1"), "must score rows\nfound: held_in 4, held_out -1"),
        (("{steps: 2}, held_out: 4", "{steps: 2}, held_out: 0"), "adapt:few must score rows\nfound: held_out 0"),
        (("methods: [lora, mu],", "methods: [lora, mu], settings: {lora: {rank: 2.5}},"),
         "settings of adapt:few for lora, key 'rank', must be a whole number or null\nfound: 2.5"),
        (("against: other, k: 2", "against: other, k: 2, seed: -1"), "drift:seed must have k and seed of at least 0"),
        (("of: private, tasks: 2", "of: private, tasks: []"), "build:part must have tasks"),
        (("routing_rows: 1, top_k: 2", "routing_rows: 1, route: {x: 1}"), "route must have fields .*\nfound: x"),
        (("routing_rows: 1, top_k: 2", "temperature: {1: a}"), "temperature, key '1', must be a number\nfound: 'a'"),
        (("seed: 1", "warmup: .nan"), "warmup must be at least 0 and at most 1\nfound: nan"),
        (("evaluate: {routing", "evaluate: {routing_rows: 1}\nevaluate: {routing"), "key 'evaluate' comes twice"),
        (("{evaluate: main", "{evaluate: more, libraries: [private], routers: [arrow], held_in: 4, "
          "settings: {top_k: 1}}\n  - {evaluate: main"), "cell private/arrow must mean one thing"),
        (("{reference: ", "{assume: {rows: x}, reference: "), "assume, key 'rows', must be a number above 0"),
        (("{reference: ", "{assume: {tokens: 3}, reference: "), "assume, must say rows, tokens and, without"),
        (("about:", "assume: {tflops: x}\nabout:"), "key 'tflops', must be a number above 0"),
        (("drift: seed}\n  - {ask: \"Does", "drift: sed}\n  - {ask: \"Does"), "must name a drift stage\nfound: sed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_place_and_value(
    change: tuple[str, str], match: str, make_study: Callable[..., Path]
) -> None:
    path = make_study(change)
    with pytest.raises(LoraryError, match=match):
        read_study(str(path))


def test_the_example_of_the_documentation_is_a_study() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(parse_study(example, "example.yaml").questions) == 5


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"one of builtin-quick, suite-cpu, paper-phi2, paper-mistral, or a file"):
        read_study(str(tmp_path / "nothing.yaml"))
    with pytest.raises(UsageError, match="must be YAML"):
        parse_study("a: [", "file.yaml")
    with pytest.raises(UsageError, match="study 'file' must be a mapping"):
        parse_study("- a", "file.yaml")
    with pytest.raises(UsageError, match=r"must have tasks.train and stages"):
        parse_study("tasks: {train: {}}", "file.yaml")
    for odd in ("a: 2020-13-45", "a: !!int b", "a: !!bool maybe", 'a: "\\ud800"', "a: &a [*a]", "[" * 3000):
        with pytest.raises(UsageError, match="study 'file' must be YAML"):
            parse_study(odd, "file.yaml")
    for odd in ("null", "5", "true"):
        with pytest.raises(UsageError, match=r"tasks.held_out, must be a list"):
            parse_study(MINIMAL.replace("}}", f"}}, held_out: {odd}}}"), "file.yaml")
    with pytest.raises(UsageError, match="stages, must be a list"):
        parse_study("tasks: {train: {}}\nstages: {build: a}", "file.yaml")


def test_held_out_sets_of_one_name_are_refused() -> None:
    sets = "held_out: [{name: a, reference: zero-shot}, {reference: sni-12}, {name: a, reference: builtin}]"
    text = MINIMAL.replace("{train: {reference: builtin}}", f"{{train: {{reference: builtin}}, {sets}}}")
    with pytest.raises(UsageError, match="a name of its own\nfound: 'a', twice"):
        parse_study(text, "study")
    assert len(parse_study(text.replace("name: a, reference: builtin", "reference: builtin"), "study").held_out) == 3


def test_a_name_that_would_leave_the_folder_is_refused() -> None:
    assert len(parse_study(MINIMAL, "file.yaml").stages) == 1
    with pytest.raises((UsageError, LibraryError), match="name"):
        parse_study(MINIMAL.replace("build: private", "build: ../private"), "file.yaml")
