"""In which template the base counts."""

from dataclasses import replace

import pytest

from lorary.data.schema import Row, Task
from lorary.evaluate.base_template import BaseTemplate, choose_templates, count_templates, template_rows
from lorary.evaluate.cells import Cell
from lorary.report.markup import template_words


def look(task: str, plain: float, chat: float, losses: tuple[float, float] = (1.0, 1.0), rows: int = 8) -> BaseTemplate:
    loss = dict(zip(("plain", "chat"), losses, strict=True))
    return BaseTemplate(task, "val", rows, {"plain": plain, "chat": chat}, loss)


def unseen(task: str) -> BaseTemplate:
    return BaseTemplate(task, "", 0, {}, {})


def base_cell(task: str, template: str, value: float, metric: str = "em") -> Cell:
    return Cell("lib", "base", task, "f", "held_in", metric, metric == "em", value, value, value, 1, 0.0, template)


@pytest.mark.parametrize(
    ("tried", "template"),
    [
        (look("a", 0.5, 0.25), "plain"),
        (look("a", 0.25, 0.5, losses=(1.0, 9.0)), "chat"),
        (look("a", 0.5, 0.5, losses=(1.0, 2.0)), "plain"),
        (look("a", 0.5, 0.5), "chat"),
        (replace(look("a", 0.5, 0.9), scores={"plain": 0.5}), "plain"),
    ],
)
def test_the_higher_score_chooses_then_the_lower_loss(tried: BaseTemplate, template: str) -> None:
    (choice,) = choose_templates([tried])
    assert (choice.template, choice.origin) == (template, "rows")


def test_a_task_without_rows_follows_most_others_and_the_chat_template_where_they_are_level() -> None:
    plain, chat = look("a", 1.0, 0.0), look("b", 0.0, 1.0)
    assert choose_templates([unseen("z"), plain])[0] == replace(unseen("z"), template="plain", origin="majority")
    assert choose_templates([unseen("z"), plain, chat])[0] == replace(unseen("z"), template="chat", origin="default")
    again = choose_templates(choose_templates([unseen("z"), plain, replace(plain, task="c"), chat]))
    assert [choice.template for choice in again] == ["plain", "plain", "plain", "chat"]


def test_the_chosen_template_counts_and_the_other_one_where_it_is_the_only_one() -> None:
    cells = [base_cell(task, name, 0.1) for task, name in (("a", "plain"), ("a", "chat"), ("b", "plain"))]
    cells += [base_cell("a", "chat", 3.0, "loss"), replace(base_cell("a", "plain", 0.9), router="arrow")]
    counted = count_templates(cells, choose_templates([look("a", 0.0, 1.0), look("b", 0.0, 1.0)]))
    assert [cell.primary for cell in counted] == [False, True, True, False, True]
    assert count_templates(counted, choose_templates([look("a", 1.0, 0.0)]))[0].primary


def test_test_rows_never_choose() -> None:
    rows = {split: (Row("a", split, "x", "y"),) * 3 for split in ("train", "val", "test")}
    task = Task("a", "f", "train", "em", rows)
    assert template_rows(task, 2) == ("val", rows["val"][:2])
    assert template_rows(replace(task, rows={**rows, "val": ()}), 2) == ("train", rows["train"][:2])
    assert template_rows(replace(task, rows={"test": rows["test"]}), 2) == ("", ())


def test_the_choice_is_said_in_words() -> None:
    choices = choose_templates([look("a", 1.0, 0.0), look("b", 1.0, 0.0, rows=4), unseen("z")])
    means = [{"router": name, "split": "held_out", "mean": value} for name, value in
             (("base", 0.5), ("base (plain)", 0.5), ("base (chat)", 0.25), ("arrow", 0.1))]  # fmt: skip
    assert template_words(list(map(vars, choices)), means) == [
        "The base counts in the template plain on 3 tasks. This was chosen on up to 8 validation rows of 2 tasks, and "
        "never on test rows",
        "Without such rows, each of these takes the choice of most other tasks: z",
        "Points on held-out tasks: base 50.0, base (plain) 50.0, base (chat) 25.0",
    ]
    assert template_words([], means) == []
