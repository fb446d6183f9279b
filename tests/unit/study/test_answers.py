"""Words of a study follow from what is comparable, and what is owed is named."""

from dataclasses import replace

from lorary.study.answers import QuestionAnswer, StudyColumn, answer
from lorary.study.question import Question

SPLIT = "held_in"
OWED = {(f"{library}/{router}", split) for library in "ab" for router in ("arrow", "lag", "base")
        for split in ("held_in", "held_out")}  # fmt: skip


def column(cell: str, values: dict[str, list[float]], data: str = "1", split: str = SPLIT) -> StudyColumn:
    library, router = cell.split("/")
    return StudyColumn(library, router, split, values, "evaluate:main", dict.fromkeys(values, ("em", data)))


def asked(question: Question, *columns: StudyColumn) -> QuestionAnswer:
    return answer(question, columns, {}, OWED)


def test_tasks_of_other_data_are_not_compared() -> None:
    ours, theirs = {"x": [1.0] * 20, "y": [1.0] * 20}, {"x": [0.0] * 20, "y": [0.0] * 20}
    question = Question("Which?", pairs=(("a/arrow", "b/arrow"),))
    same = asked(question, column("a/arrow", ours), column("b/arrow", theirs))
    assert same.rows[0]["tasks"] == 2
    other = asked(question, column("a/arrow", ours), column("b/arrow", theirs, data="2"))
    assert not other.rows


def test_a_split_that_is_owed_is_named() -> None:
    question = Question("Which?", pairs=(("a/arrow", "b/arrow"),))
    half = asked(question, column("a/arrow", {"x": [1.0]}), column("b/arrow", {"x": [1.0]}),
                 column("a/arrow", {"z": [1.0]}, split="held_out"))  # fmt: skip
    assert half.unfinished == ["b/arrow held-out"]
    assert asked(question).unfinished == ["a/arrow", "b/arrow"]


def test_the_highest_mean_is_one_over_the_same_tasks() -> None:
    question = Question("Which rule?", cells=("a/lag", "a/arrow"), against="a/base")
    hard = {"hard": [0.0] * 4}
    found = asked(
        question,
        column("a/lag", {"easy": [0.7, 0.7, 0.7, 0.7]}),  # it has no score of the hard task
        column("a/arrow", {"easy": [1.0] * 4, **hard}),
        column("a/base", {"easy": [0.5] * 4, **hard}),
    )
    assert found.lines[-1] == "the highest mean of these on held-in tasks is that of a/arrow"


def test_the_highest_mean_is_one_over_the_same_rows() -> None:
    question = Question("Which rule?", cells=("a/lag", "a/base"), against="a/arrow")
    found = asked(question, column("a/lag", {"x": [1.0] * 10 + [0.0] * 10}), column("a/base", {"x": [0.0] * 20}),
                  column("a/arrow", {"x": [0.0] * 20 + [1.0] * 180}))  # fmt: skip
    assert found.lines[0].startswith("a/lag is ahead of a/arrow on held-in tasks: +50.0 points")
    assert found.lines[-1] == "the highest mean of these on held-in tasks is that of a/lag"


def test_a_task_that_could_not_be_scored_is_owed() -> None:
    question = Question("Which?", pairs=(("a/arrow", "b/arrow"),))
    broken = replace(column("b/arrow", {"x": [1.0]}), failed=("y",))
    found = asked(question, column("a/arrow", {"x": [1.0], "y": [1.0]}), broken)
    assert "b/arrow on y" in found.unfinished


def test_a_whole_that_gains_nothing_is_told_from_one_that_cannot_be_compared() -> None:
    question = Question("How much?", cells=("a/arrow",), share_of="a/lag")
    base, better = {"x": [0.0] * 20}, {"x": [1.0] * 20}
    none = asked(question, column("a/arrow", better), column("a/lag", base), column("a/base", base))
    assert "gains nothing" in none.lines[0]
    apart = asked(question, column("a/arrow", better), column("a/lag", better, data="2"), column("a/base", base))
    assert not apart.lines


def test_only_tasks_and_rows_that_both_have_are_compared() -> None:
    question = Question("Which?", pairs=(("a/arrow", "b/arrow"),))
    ours, theirs = {"a": [1.0, 0.0, 0.0], "b": [1.0]}, {"a": [0.0, 0.0], "c": [1.0]}
    (row,) = asked(question, column("a/arrow", ours), column("b/arrow", theirs)).rows
    assert (row["difference"], row["tasks"], row["rows"]) == (0.5, 1, 2)
    assert not asked(question, column("a/arrow", {"a": [1.0]}), column("b/arrow", {"b": [1.0]})).rows


def test_a_gap_closed_is_that_of_the_tasks_and_rows_of_all_three() -> None:
    question = Question("How much?", cells=("a/arrow",), share_of="a/lag")
    whole, base = {"x": [1.0] * 40}, {"x": [0.0] * 40}
    found = asked(question, column("a/arrow", {"x": [1.0] * 10}), column("a/lag", whole), column("a/base", base))
    assert (found.rows[0]["gap_to"], found.rows[0]["closed"], found.rows[0]["rows"]) == ("a/lag", 1.0, 10)
    assert found.lines[0].startswith("a/arrow closes 100 % of the gap from the base to a/lag on held-in tasks")


def test_the_tasks_on_which_the_base_wins_are_said_in_words_one_can_read() -> None:
    question = Question("Where?", cells=("a/arrow",), base_wins=True)
    base = {"x": [1.0] * 20, "y": [1.0] * 20, "z": [0.0] * 20}
    mixed = asked(
        question, column("a/arrow", {**base, "x": [0.0] * 20, "y": [0.0] + [1.0] * 19}), column("a/base", base)
    )
    assert mixed.lines == ["of 3 held-in tasks, the base scores higher than a/arrow on 2, clearly on x"]
    level = asked(question, column("a/arrow", {**base, "y": [0.0] + [1.0] * 19}), column("a/base", base))
    assert level.lines == ["of 3 held-in tasks, the base scores higher than a/arrow on 1, on none of them clearly"]
    none = asked(question, column("a/arrow", base), column("a/base", base))
    assert none.lines == ["of 3 held-in tasks, the base scores higher than a/arrow on none"]
