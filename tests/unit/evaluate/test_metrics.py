"""Scores of single answers."""

from itertools import combinations
from math import exp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.data.schema import Row
from lorary.errors import TaskError
from lorary.evaluate.metrics import CHOICE_METRICS, REPORTED, TEXT_METRICS, find_metric
from lorary.evaluate.metrics.exact import exact_match, normalised_match
from lorary.evaluate.metrics.f1 import token_f1
from lorary.evaluate.metrics.passing import parse_pass, pass_at_k
from lorary.evaluate.metrics.perplexity import perplexity
from lorary.evaluate.metrics.rouge import rouge_l, single_reference


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
    assert rouge_l("a red house", references) == TEXT_METRICS["rougeL"].compare("a red house", references) == 1.0


def test_the_single_reference_is_drawn_by_the_content_of_its_row() -> None:
    references = ("one", "two", "three")
    rows = [Row("t", "test", f"question {i}", "one", targets=references) for i in range(60)]
    drawn = [single_reference(row) for row in rows]
    assert drawn == [single_reference(row) for row in rows]
    assert drawn[::-1] == [single_reference(row) for row in rows[::-1]]
    assert all(10 <= drawn.count(reference) <= 30 for reference in references)
    assert single_reference(Row("t", "test", "question", "only")) == "only"


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("(A)", "a", 1.0),
        ("Valid.", "valid", 1.0),
        ("no  way", "No way!", 1.0),
        ("valid", "invalid", 0.0),
        ("", "a", 0.0),
        ("-50", "5.0", 1.0),
        # Nothing of these references is left.
        (" ]  )", "] )", 1.0),
        ("] ]", "] )", 0.0),
        ("", "]", 0.0),
        ("", "", 1.0),
    ],
)
def test_normalised_match_forgives_case_and_punctuation(answer: str, reference: str, score: float) -> None:
    assert normalised_match(answer, ["another", reference]) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("the cat sat", ["a cat sat"], 1.0),
        ("cat", ["cat sat"], 2 / 3),
        ("cat cat", ["cat"], 2 / 3),
        ("dog", ["cat", "a dog!"], 1.0),
        ("dog", ["cat"], 0.0),
        ("the", ["an"], 1.0),
        ("", ["cat"], 0.0),
    ],
)
def test_token_f1_is_the_harmonic_mean_over_words(answer: str, references: list[str], score: float) -> None:
    assert token_f1(answer, references) == pytest.approx(score)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_every_text_metric_lies_between_0_and_1_and_is_1_for_a_reference(answer: str, references: list[str]) -> None:
    for metric in TEXT_METRICS:
        assert 0.0 <= TEXT_METRICS[metric].compare(answer, references) <= 1.0
        if metric != "rougeL" and metric != "rougeL_single":  # words of other scripts are none to rouge-score
            assert TEXT_METRICS[metric].compare(references[0], references) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_program_that_passed(num_samples: int, data: st.DataObject) -> None:
    num_passed = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    draws = list(combinations([True] * num_passed + [False] * (num_samples - num_passed), k))
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_spelling_of_pass_at_k_is_exact() -> None:
    assert [parse_pass(name) for name in ("pass@1", "pass@25", "pass@", "pass@01", "pass@-1", "xpass@1")] == [
        1, 25, None, None, None, None
    ]  # fmt: skip


def test_perplexity_is_the_exponential_of_the_loss_and_never_overflows() -> None:
    assert perplexity(2.0) == pytest.approx(exp(2.0))
    assert perplexity(5000.0) < float("inf")


@pytest.mark.parametrize("metric", ["pass@k", "accuracy", "", "ACC"])
def test_a_metric_that_cannot_be_computed_is_refused_by_name(metric: str) -> None:
    with pytest.raises(TaskError, match=rf"task 'code' must be one of .*pass@1.*\nfound: {metric}"):
        find_metric(metric, "code")


@pytest.mark.parametrize("metric", REPORTED)
def test_what_is_no_score_between_0_and_1_is_refused_as_the_metric_of_a_task(metric: str) -> None:
    with pytest.raises(TaskError, match=r"must be a score in 0\.\.1(.|\n)*reported beside every metric"):
        find_metric(metric, "text")


@pytest.mark.parametrize("metric", [*CHOICE_METRICS, *TEXT_METRICS, "pass@1", "pass@10"])
def test_a_metric_that_exists_is_found(metric: str) -> None:
    assert find_metric(metric, "text").name == metric
