"""How a model answers rows: losses, ranked options, generated text; each against a plain statement of the same."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from lorary.data.schema import Row, Task
from lorary.data.template import Template, make_template
from lorary.errors import TaskError
from lorary.evaluate.answers import RowScores
from lorary.evaluate.answers import score_rows as score_rows_by
from lorary.evaluate.decoding import cut_at
from lorary.evaluate.generation import Sampler, generate_answers, left_pad, stop_ids
from lorary.evaluate.loglik import AnswerLoss, answer_losses
from lorary.evaluate.metrics import find_metric, scorable_tasks
from lorary.evaluate.metrics.choice import ACC, ACC_NO_EOS, ACC_RAW
from lorary.evaluate.sandbox import RunOutcome, Sandbox

Make = Callable[..., Any]


def score_rows(
    model: Any, tokenizer: Any, template: Template, rows: Sequence[Row], name: str, **more: Any
) -> RowScores:
    """Scores under a metric by its name."""
    return score_rows_by(model, tokenizer, template, rows, find_metric(name, "t"), **more)


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
    assert ACC.choose([[short, long]]) == [1]
    assert ACC_RAW.choose([[short, long]]) == [0]


def test_the_loss_of_eos_is_that_of_the_last_token(model: Any, template: Template) -> None:
    examples = [template.encode(source, target) for source in SOURCES for target in ("blue", "three and more")]
    for example, loss in zip(examples, answer_losses(model, examples, max_tokens=60), strict=True):
        without = plain_loss(model, example.prompt_ids, example.target_ids[:-1])
        assert loss.total - loss.eos == pytest.approx(without, rel=1e-5)
        assert loss.mean_no_eos == pytest.approx(without / (len(example.target_ids) - 1), rel=1e-5)


def test_counting_eos_or_not_changes_the_choice() -> None:
    # Two tokens at 1 nat each and a certain end, against one token at 0.9 nats and an unlikely end.
    certain, unlikely = AnswerLoss(2.0, 3, 0.0), AnswerLoss(2.9, 2, 2.0)
    assert ACC.choose([[unlikely, certain]]) == [1]
    assert ACC_NO_EOS.choose([[unlikely, certain]]) == [0]


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


@pytest.mark.parametrize("default", [{"repetition_penalty": 5.0}, {"num_beams": 3}, {"no_repeat_ngram_size": 1}])
def test_generation_defaults_of_the_base_play_no_part_in_an_answer(
    default: dict[str, Any], model: Any, tokenizer: Any, template: Template
) -> None:
    prompts = [template.encode_prompt(source) for source in SOURCES]
    plain = generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    own = GenerationConfig(**default, eos_token_id=[0, 7])
    model.generation_config = own
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=12) == plain
    assert model.generation_config is own
    with pytest.raises(IndexError):
        generate_answers(model, tokenizer, [[10_000]], max_new_tokens=2)
    assert model.generation_config is own


@pytest.fixture
def short_model() -> Any:
    """A model that has a vector for each of its 48 positions, and none beyond."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 300, "n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 4}
        return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()


@pytest.mark.parametrize("asked", [None, 20, 47, 48, 300])
def test_a_prompt_leaves_room_for_its_answer_in_the_context(
    short_model: Any, tokenizer: Any, asked: int | None
) -> None:
    template = make_template("plain", tokenizer, max_length=48)
    generation = {} if asked is None else {"generation": {"max_new_tokens": asked}}
    # With their own target the rows fit.
    source = "x" * 44
    assert template.encode(source, "up").truncated == 0
    rows = [
        Row("t", "test", source, "up", extra=generation),
        Row("t", "test", "one", "three and more", extra=generation),
    ]
    too_many = f"task 't': answers have at most 24 of the {asked} tokens they ask for, since the base has 48 positions"
    with (
        pytest.warns(UserWarning, match=too_many) if asked in (48, 300) else nullcontext(),
        pytest.warns(UserWarning, match="task 't': the prompts of [12] of 2 rows were too long and lost their start"),
    ):
        scores = score_rows(short_model, tokenizer, template, rows, "em")
    assert len(scores.score) == 2


def test_a_prompt_that_has_room_for_its_answer_is_fed_whole(short_model: Any, tokenizer: Any) -> None:
    template = make_template("plain", tokenizer, max_length=48)
    row = Row("t", "test", "x" * 20, "up", extra={"generation": {"max_new_tokens": 28}})
    prompt = template.encode_prompt(row.source)
    assert len(prompt) == 20
    assert template.encode_prompt(row.source, 5) == prompt[-5:]
    answer = generate_answers(short_model, tokenizer, [prompt], 28)[0]
    right = Row("t", "test", row.source, "no", targets=("no", answer), extra=row.extra)
    assert score_rows(short_model, tokenizer, template, [right], "em").score == [1.0]


def test_padding_is_masked_by_position_and_not_by_id() -> None:
    input_ids, mask = left_pad([[7, 0], [5, 0, 0, 9]], pad_id=0)
    assert input_ids.tolist() == [[0, 0, 7, 0], [5, 0, 0, 9]]
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_options_are_ranked_by_their_likelihood(model: Any, tokenizer: Any, template: Template) -> None:
    options = ("blue", "three", "June and July")
    rows = [Row("t", "test", source, options[i], options=options) for i, source in enumerate(SOURCES)]
    for metric in ("acc", "acc_no_eos", "acc_raw"):
        scores = score_rows(model, tokenizer, template, rows, metric)
        expected, likeliest = [], []
        for row in rows:
            values = []
            for option in options:
                example = template.encode(row.source, option)
                ids = example.target_ids[:-1] if metric == "acc_no_eos" else example.target_ids
                loss = plain_loss(model, example.prompt_ids, ids)
                values.append(loss if metric == "acc_raw" else loss / len(ids))
            likeliest.append(options[values.index(min(values))])
            expected.append(float(likeliest[-1] == row.target))
        assert scores.answers == likeliest
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
    assert scores.answers == again
    assert scores.score == [float(again[0].split() == answer.split())]


def test_no_rows_are_refused(model: Any, tokenizer: Any, template: Template) -> None:
    with pytest.raises(TaskError, match="must have rows"):
        score_rows(model, tokenizer, template, [], "em")


def test_one_continuation_is_scored_after_the_context_of_each_option(
    model: Any, tokenizer: Any, template: Template
) -> None:
    contexts, continuation = ["The trophy did not fit the case, the trophy", "It did not fit, the case"], "was too big."
    losses = []
    for context in contexts:
        example = template.encode(context, continuation)
        losses.append(plain_loss(model, example.prompt_ids, example.target_ids) / len(example.target_ids))
    options = ("the trophy", "the case")
    best = losses.index(min(losses))
    for right in (0, 1):
        extra = {"contexts": contexts, "continuation": continuation}
        row = Row("t", "test", "The _ was too big.", options[right], options=options, extra=extra)
        scores = score_rows(model, tokenizer, template, [row], "acc")
        assert scores.score == [float(right == best)]
        assert scores.loss == [pytest.approx(losses[right], rel=1e-5)]


@pytest.mark.parametrize(
    "extra",
    [
        {"contexts": ["one"], "continuation": "end"},
        {"contexts": ["one", " "], "continuation": "end"},
        {"contexts": ["one", "two"]},
        {"contexts": "one", "continuation": "end"},
        {"continuation": "end"},
    ],
)
def test_contexts_that_do_not_fit_the_options_are_refused(
    extra: dict[str, Any], model: Any, tokenizer: Any, template: Template
) -> None:
    row = Row("t", "test", "one", "a", options=("a", "b"), extra=extra)
    with pytest.raises(TaskError, match=r"'contexts' in extra of task 't' must be a text per option"):
        score_rows(model, tokenizer, template, [row], "acc")


def test_an_answer_ends_where_its_row_says(model: Any, tokenizer: Any, template: Template) -> None:
    source = SOURCES[0]
    [whole] = generate_answers(model, tokenizer, [template.encode_prompt(source)], max_new_tokens=12)
    stop = whole.lstrip("\n")[2:4]
    [cut] = generate_answers(model, tokenizer, [template.encode_prompt(source)], max_new_tokens=12, stop=(stop,))
    assert cut == cut_at(whole, (stop,)) != whole
    rows = [
        Row(
            "t", "test", source, "no", targets=("no", cut), extra={"generation": {"max_new_tokens": 12, "stop": [stop]}}
        ),
        Row("t", "test", source, "no", targets=("no", whole), extra={"generation": {"max_new_tokens": 12}}),
        Row("t", "test", source, "no"),
    ]
    scores = score_rows(model, tokenizer, template, rows, "em")
    assert scores.score[:2] == [1.0, 1.0]
    assert scores.score == [score_rows(model, tokenizer, template, [row], "em").score[0] for row in rows]


def test_a_sampled_answer_depends_on_its_own_seed_and_not_on_its_batch(
    model: Any, tokenizer: Any, template: Template
) -> None:
    prompts = [template.encode_prompt(source) for source in [*SOURCES, SOURCES[0]]]
    sample: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.9}
    together = generate_answers(model, tokenizer, prompts, seeds=[1, 2, 3, 4], **sample)
    alone = [generate_answers(model, tokenizer, [p], seeds=[i], **sample)[0] for i, p in enumerate(prompts, start=1)]
    assert together == alone
    assert together[0] != together[3]
    greedy = generate_answers(model, tokenizer, prompts, max_new_tokens=6)
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=6, temperature=1e-6, seeds=[1, 2, 3, 4]) == greedy


def test_sampled_tokens_follow_the_distribution_within_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampler = Sampler(1.0, 0.75, [7])
    drawn = torch.stack([sampler(torch.zeros(1, 1), logits)[0].argmax() for _ in range(2000)])
    shares = torch.bincount(drawn, minlength=4) / 2000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8, atol=0.04)


@pytest.mark.parametrize(
    "asked",
    [
        3, {"stop": "text"}, {"stop": [""]}, {"max_new_tokens": 0}, {"max_new_tokens": True}, {"samples": 1.5},
        {"temperature": -1}, {"top_p": 0}, {"beams": 2}, {"samples": 10**9}, {"max_new_tokens": 10**400},
        {"temperature": 10**400}, {"temperature": 1e300}, {"top_p": 10**400}, {"samples": 10**400},
    ],
)  # fmt: skip
def test_a_row_that_asks_for_what_cannot_be_generated_is_refused(
    asked: Any, model: Any, tokenizer: Any, template: Template
) -> None:
    row = Row("t", "test", "one", "blue", extra={"generation": asked})
    with pytest.raises(TaskError, match=r"'generation' in extra of task 't' (may|must)"):
        score_rows(model, tokenizer, template, [row], "em")


def test_programs_do_not_run_without_leave(model: Any, tokenizer: Any, template: Template) -> None:
    row = Row("t", "test", "def f():", "pass", extra={"test": "f()"})
    with pytest.raises(TaskError, match=r"must be allowed(.|\n)*--allow-code"):
        score_rows(model, tokenizer, template, [row], "pass@1")


class Judge:
    """Stands for a sandbox: a program passes where it holds a text."""

    def __init__(self, text: str) -> None:
        self.text, self.programs = text, []

    def run(self, program: str) -> RunOutcome:
        self.programs.append(program)
        return RunOutcome("passed" if self.text in program else "failed")


def test_programs_are_the_prompt_the_completion_and_the_tests(
    model: Any, tokenizer: Any, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.evaluate.answers.generate_answers", lambda *args, **options: [" 1\n", " 2\n"])
    rows = [Row("t", "test", f"x = {i} +", "1", extra={"test": ["assert x", "assert y"]}) for i in (3, 4)]
    judge = Judge("+ 2")
    monkeypatch.setattr(Sandbox, "run", lambda self, program: judge.run(program))
    scores = score_rows(model, tokenizer, template, rows, "pass@1", sandbox=Sandbox("none"))
    assert scores.score == [0.0, 1.0]
    assert (scores.metric, len(scores.loss)) == ("pass@1", 2)
    assert judge.programs[0] == "x = 3 + 1\n\nassert x\nassert y\n"


def test_line_breaks_before_a_completion_stay_in_a_program_and_go_from_an_answer(
    model: Any, tokenizer: Any, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n    return 1"
    monkeypatch.setattr("lorary.evaluate.answers.generate_answers", lambda *args, **options: [cut_at(text, ("\n#",))])
    judge = Judge("def f():\n    return 1\n")
    monkeypatch.setattr(Sandbox, "run", lambda self, program: judge.run(program))
    row = Row("t", "test", "def f():", "pass", extra={"test": "f()"})
    assert score_rows(model, tokenizer, template, [row], "pass@1", sandbox=Sandbox("none")).score == [1.0]
    row = Row("t", "test", "q", "    return 1", extra={"generation": {"stop": ["\n#"]}})
    assert score_rows(model, tokenizer, template, [row], "em").score == [1.0]


def test_a_sandbox_that_runs_nothing_is_no_wrong_program(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("t", "test", "x = 1", "", extra={"test": "assert x"})
    status = {"": "broken"}
    monkeypatch.setattr(Sandbox, "run", lambda self, program: RunOutcome(status.get(program, "broken"), "no room"))
    with pytest.raises(TaskError, match="the sandbox must run programs\nfound: no room"):
        find_metric("pass@1", "t").score(row, [""], Sandbox("none"))
    status[""] = "passed"  # it was the program that broke what watched it
    assert find_metric("pass@1", "t").score(row, [""], Sandbox("none")) == 0.0


def test_options_that_differ_in_nothing_but_what_is_cut_off_are_refused(model: Any, tokenizer: Any) -> None:
    short = make_template("plain", tokenizer, max_length=24)
    contexts = [f"{first} {'and so on ' * 30}" for first in ("one", "two")]
    row = Row("t", "test", "s", "a", options=("a", "b"), extra={"contexts": contexts, "continuation": "end"})
    with pytest.raises(TaskError, match="options of task 't' must differ within max_length"):
        score_rows(model, tokenizer, short, [row], "acc")
    longer = Row("t", "test", "so " * 7, "a", options=("a", "b " * 7))
    with pytest.warns(UserWarning, match="prompts of 1 of 1 rows were too long"):
        score_rows(model, tokenizer, short, [longer], "acc")


def test_references_that_rouge_cannot_read_are_told_of(model: Any, tokenizer: Any, template: Template) -> None:
    rows = [Row("t", "test", "q", text) for text in ("?!", "word")]
    with pytest.warns(UserWarning, match="task 't': ROUGE-L finds no word .* in the references of 1 rows"):
        score_rows(model, tokenizer, template, rows, "rougeL")


def test_pass_at_k_draws_k_programs_of_a_row(
    model: Any, tokenizer: Any, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge("(f)")
    monkeypatch.setattr(Sandbox, "run", lambda self, program: judge.run(program))
    extra = {"test": "def check(f): pass", "entry_point": "f", "generation": {"max_new_tokens": 3}}
    row = Row("t", "test", "def f():", "pass", extra=extra)
    assert score_rows(model, tokenizer, template, [row], "pass@3", sandbox=Sandbox("none")).score == [1.0]
    assert len(judge.programs) == 3
    assert all(program.endswith("def check(f): pass\ncheck(f)\n") for program in judge.programs)


@pytest.mark.parametrize(
    ("extra", "metric", "message"),
    [
        ({}, "pass@1", r"must give its tests in extra\.test"),
        ({"test": 3}, "pass@1", r"must give its tests in extra\.test"),
        ({"test": []}, "pass@1", r"must give its tests in extra\.test"),
        ({"test": "x", "entry_point": "f()"}, "pass@1", r"must name a function"),
        ({"test": "x", "generation": {"temperature": 0}}, "pass@2", r"needs 2 sampled programs"),
        ({"test": "x", "generation": {"samples": 4}}, "pass@5", r"found: 4 at temperature 0\.8"),
    ],
)
def test_a_row_whose_programs_cannot_be_judged_is_refused(
    extra: dict[str, Any], metric: str, message: str, model: Any, tokenizer: Any, template: Template
) -> None:
    row = Row("t", "test", "def f():", "pass", extra=extra)
    with pytest.raises(TaskError, match=message):
        score_rows(model, tokenizer, template, [row], metric, sandbox=Sandbox("none"))


def test_tasks_that_need_programs_to_run_are_left_out_by_name_where_others_go_on() -> None:
    code, text = (Task(name, "none", "heldout", metric, {}) for name, metric in (("code", "pass@1"), ("text", "em")))
    with pytest.warns(UserWarning, match=r"left out: code \(running generated code needs --allow-code\)"):
        assert list(scorable_tasks({"code": code, "text": text}, allow_code=False)) == ["text"]
    with pytest.raises(TaskError, match="must be allowed"):
        scorable_tasks({"code": code}, allow_code=False)


def test_an_answer_of_a_word_level_tokenizer_keeps_its_spaces_before_punctuation(model: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0} | {f"w{i}" if i % 2 else f",{'.' * i}": i for i in range(1, 300)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=True
    )
    prompt = [3, 5, 9]
    output = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    own = {number: word for word, number in vocabulary.items()}
    expected = "".join(f" {own[i]}" for i in output if i)
    assert generate_answers(model, tokenizer, [prompt, [7]], max_new_tokens=6)[0] == expected
