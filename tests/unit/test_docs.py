"""The documentation names everything there is, and its tables say what the code says."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.support.settings_tables import build_settings, pages, written

from lorary.adapt.settings import METHODS
from lorary.axes import AXES
from lorary.build.settings import BuildSettings
from lorary.cli.app import app
from lorary.cli.grouped import GROUPS
from lorary.data.builtin.catalogue import DEMO_TASKS, builtin_tasks
from lorary.data.schema import FIELDS
from lorary.evaluate.base_template import BaseTemplate
from lorary.evaluate.cells import Cell, CellFailure
from lorary.evaluate.evaluation import ExpertLosses
from lorary.evaluate.metrics import CHOICE_METRICS, TEXT_METRICS
from lorary.evaluate.routing_accuracy import RoutingAccuracy, RoutingUsage
from lorary.evaluate.settings import EvaluateSettings
from lorary.evaluate.summary import Comparison, Mean, OracleGap
from lorary.formats.peft_config import REFUSED
from lorary.route import ROUTERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = list(pages())
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table, without the marks of code."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def commands(command: Any, path: str = "lorary") -> list[str]:
    children = getattr(command, "commands", {})
    return [full for name, child in children.items() for full in commands(child, f"{path} {name}")] or [path]


def test_every_command_is_named() -> None:
    everything = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    found = commands(typer.main.get_command(app))
    assert "lorary library verify" in found
    assert [command for command in found if command not in everything] == []


def test_the_table_of_builtin_tasks_is_that_of_the_catalogue() -> None:
    table = {row[1].split()[0]: row for row in rows(page("tasks.md")) if len(row) == 6 and row[0] != "family"}
    table.pop("---", None)
    tasks = builtin_tasks()
    assert set(table) == set(tasks)
    for name, task in tasks.items():
        family, label, instruction, metric, example, sizes = table[name]
        row = task.split("test")[0]
        question = row.source.removeprefix(instruction).removesuffix("\nAnswer:").strip()
        assert (family, metric, example) == (task.family, task.metric, f"{question} → {row.target}")
        assert sizes == "/".join(str(len(task.split(split))) for split in ("train", "val", "test"))
        assert ("held out" in label, "*" in label) == (task.role == "heldout", name in DEMO_TASKS)


def test_the_fields_of_a_row_and_every_metric_are_explained() -> None:
    explained = {row[0] for row in rows(page("tasks.md"))}
    assert explained >= FIELDS
    assert explained >= {*CHOICE_METRICS, *TEXT_METRICS}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_adaptation_has_a_card(method: str) -> None:
    assert f"\n### {method}\n" in page("adapt.md")


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_has_a_card(router: str) -> None:
    assert f"\n### {router}\n" in page("routers.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page[0].stem)
def test_the_tables_of_settings_are_those_of_the_classes(page: tuple[Path, str]) -> None:
    path, text = page
    assert path.read_text(encoding="utf-8") == text, "run: python -m tests.support.settings_tables --write"


def test_a_table_of_settings_has_every_field_with_its_default_and_the_preset() -> None:
    table = {row[1]: row for row in rows("\n".join(build_settings()))[2:]}
    assert set(table) == {field.name for field in fields(BuildSettings)}
    assert table["rank"] == ["--rank", "rank", "4", "", "rank of every expert"]
    assert table["epochs"][2:4] == ["–", "5"]
    assert table["clip"][0] == ""
    assert table["init_scale"][3] == "0.5774"


def test_a_page_without_the_place_of_its_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"docs/clusters\.md must have the lines"):
        written("of lorary cluster", "# Clusters")


@pytest.mark.parametrize("command", ["build", "adapt", "evaluate", "explain", "generate"])
def test_every_option_has_a_help_of_its_own(command: str) -> None:
    root: Any = typer.main.get_command(app)
    helps = {parameter.opts[0]: parameter.help for parameter in root.commands[command].params}
    assert [option for option, text in helps.items() if not text or "`" in text or " None" in text] == []


def test_every_command_is_in_a_group_of_the_help() -> None:
    root: Any = typer.main.get_command(app)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(root.commands)


def test_every_option_of_the_large_commands_is_named() -> None:
    root: Any = typer.main.get_command(app)
    for command, name in (
        ("build", "training.md"),
        ("evaluate", "evaluation.md"),
        ("adapt", "adapt.md"),
        ("merge", "merging.md"),
    ):
        options = {option for parameter in root.commands[command].params for option in parameter.opts}
        text = page(name) + page("tutorial.md")
        assert [option for option in sorted(options) if option.startswith("--") and option not in text] == []


def test_every_key_of_the_results_is_named() -> None:
    text = page("evaluation.md")
    kinds: tuple[Any, ...] = (
        Cell, CellFailure, Mean, Comparison, OracleGap, RoutingAccuracy, RoutingUsage, ExpertLosses, BaseTemplate,
        EvaluateSettings,
    )  # fmt: skip
    keys = {field.name for kind in kinds for field in fields(kind)} - {"values"}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_every_refused_field_of_peft_is_named() -> None:
    text = page("library.md")
    assert [field for field in REFUSED if f"`{field}`" not in text] == []


def test_every_axis_is_explained() -> None:
    explained = {row[0] for row in rows(page("glossary.md"))}
    assert explained >= set(AXES)


def test_the_paper_map_points_at_functions_and_tests_that_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    table = [row for row in page("paper_map.md").splitlines() if row.startswith("| ")][1:]
    for row in table:
        _, code, named = row.strip("| ").split(" | ")
        for test in re.findall(r"`(test_\w+)`", named):
            assert f"def {test}(" in tests, test
        source: set[str] = set()
        for word in re.findall(r"`([^`]+)`", code):
            if word.endswith(".py"):
                tree = ast.parse((ROOT / "src/lorary" / word).read_text(encoding="utf-8"))
                source = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            elif word.isidentifier():
                assert word in source, f"{word} in {row}"


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_somewhere(path: Path) -> None:
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
