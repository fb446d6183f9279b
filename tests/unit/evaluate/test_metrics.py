"""Scores of single answers."""

import pytest

from lorary.errors import TaskError
from lorary.evaluate.metrics import check_metric, exact_match, rouge_l, text_score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Paris", ["Paris"], 1.0),
        ("  Paris\n", ["Paris"], 1.0),
        ("New   York", ["New York"], 1.0),
        ("paris", ["Paris"], 0.0),
        ("Paris.", ["Paris"], 0.0),
        ("two", ["2", "two"], 1.0),
        ("", ["Paris"], 0.0),
    ],
)
def test_exact_match_forgives_white_space_only(answer: str, references: list[str], score: float) -> None:
    assert exact_match(answer, references) == score


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # Four of the answer's five words stand, in order, in the reference of six words.
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("the cat sat on mats", ["the big cat sat on it"]) == pytest.approx(expected)


def test_rouge_l_takes_the_best_reference() -> None:
    references = ["nothing alike", "a red house"]
    assert rouge_l("a red house", references) == text_score("rougeL", "a red house", references) == 1.0


def test_a_metric_that_cannot_be_computed_is_refused_by_name() -> None:
    with pytest.raises(TaskError, match=r"task 'code' must be one of .*\nfound: pass@1"):
        check_metric("pass@1", "code")
