"""How a model answers rows: losses, ranked options, generated text; each against a plain statement of the same."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lorary.data.tasks import Row
from lorary.data.template import Template, make_template
from lorary.errors import TaskError
from lorary.evaluate.answers import score_rows
from lorary.evaluate.generation import generate_answers, left_pad, stop_ids
from lorary.evaluate.loglik import AnswerLoss, answer_losses, choose_options

Make = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Make) -> Any:
    return tiny_model()


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def template(tokenizer: Any) -> Template:
    return make_template("plain", tokenizer)


def plain_loss(model: Any, prompt: Sequence[int], target: Sequence[int]) -> float:
    """Summed negative log-likelihood of a target, one row, all logits, no padding."""
    ids = torch.tensor([[*prompt, *target]])
    logprobs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(target))


SOURCES = ["one", "Name the colour of the sky: a longer prompt", "two words"]


def test_losses_in_a_batch_equal_those_of_each_row_alone(model: Any, template: Template) -> None:
    examples = [template.encode(source, target) for source in SOURCES for target in ("blue", "three and more")]
    for max_tokens in (1, 40, 4000):
        losses = answer_losses(model, examples, max_tokens=max_tokens)
        for example, loss in zip(examples, losses, strict=True):
            assert loss.num_tokens == len(example.target_ids)
            expected = plain_loss(model, example.prompt_ids, example.target_ids)
            assert loss.total == pytest.approx(expected, rel=1e-5)


def test_the_length_normalised_and_the_raw_choice_differ_where_lengths_do() -> None:
    short, long = AnswerLoss(3.0, 1), AnswerLoss(4.0, 4)
    assert choose_options([[short, long]], normalise=True) == [1]
    assert choose_options([[short, long]], normalise=False) == [0]


def test_greedy_answers_in_a_batch_equal_a_step_by_step_loop(model: Any, tokenizer: Any, template: Template) -> None:
    prompts = [template.encode_prompt(source) for source in SOURCES]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=6, max_tokens=60)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in stop_ids(model, tokenizer):
                break
        assert answer == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_padding_is_masked_by_position_and_not_by_id() -> None:
    input_ids, mask = left_pad([[7, 0], [5, 0, 0, 9]], pad_id=0)
    assert input_ids.tolist() == [[0, 0, 7, 0], [5, 0, 0, 9]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_options_are_ranked_by_their_likelihood(model: Any, tokenizer: Any, template: Template) -> None:
    options = ("blue", "three", "June and July")
    rows = [Row("t", "test", source, options[i], options=options) for i, source in enumerate(SOURCES)]
    for metric, normalise in (("acc", True), ("acc_raw", False)):
        scores = score_rows(model, tokenizer, template, rows, metric)
        expected = []
        for row in rows:
            values = []
            for option in options:
                example = template.encode(row.source, option)
                loss = plain_loss(model, example.prompt_ids, example.target_ids)
                values.append(loss / len(example.target_ids) if normalise else loss)
            expected.append(float(options[values.index(min(values))] == row.target))
        assert scores.score == expected
        assert scores.metric == metric


def test_rows_without_options_are_scored_by_exact_match_and_say_so(
    model: Any, tokenizer: Any, template: Template
) -> None:
    scores = score_rows(model, tokenizer, template, [Row("t", "test", "one", "blue")], "acc")
    assert scores.metric == "em"


def test_a_model_that_answers_right_scores_one(model: Any, tokenizer: Any, template: Template) -> None:
    prompt = template.encode_prompt(SOURCES[0])
    answer = generate_answers(model, tokenizer, [prompt], max_new_tokens=4)[0]
    row = Row("t", "test", SOURCES[0], "no", targets=("no", answer.strip() or "no"))
    # The reference is cut where the answer was, so that only rows as long as a reference can match.
    scores = score_rows(model, tokenizer, template, [row], "em")
    again = generate_answers(
        model, tokenizer, [prompt], max_new_tokens=len(template.encode("x", row.targets[1]).target_ids)
    )
    assert scores.score == [float(again[0].split() == answer.split())]


def test_no_rows_are_refused(model: Any, tokenizer: Any, template: Template) -> None:
    with pytest.raises(TaskError, match="must have rows"):
        score_rows(model, tokenizer, template, [], "em")
