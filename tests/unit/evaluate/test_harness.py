"""Tasks of lm-evaluation-harness score alike with its own class for transformers models and with ours, routed too."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness_tasks import FORMS, write_forms

from lorary.data.template import make_template
from lorary.errors import BaseModelError, TaskError
from lorary.evaluate.loglik import answer_losses
from lorary.model.attach import routing

pytest.importorskip("lm_eval")

Make = Callable[..., Any]
CHOICES = ("tiny_arc", "tiny_piqa", "tiny_boolq")


class Asked(NamedTuple):
    """A request as the harness makes it."""

    args: tuple[Any, ...]
    task_name: str = "made"
    repeats: int = 1


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def routed(tiny_model: Make, random_adapter: Make, route: Make, generator: Any) -> Any:
    model = tiny_model(seed=3)
    return route(model, [random_adapter(model, name, generator) for name in "abc"], top_k=2)


@pytest.fixture
def pair(routed: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Our model and the harness's own over the same weights."""
    from lorary.evaluate.harness import HFLM, HarnessModel

    return HarnessModel(routed, tokenizer), HFLM(pretrained=routed, tokenizer=tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lorary.evaluate.harness import load_tasks

    names = ["tiny_group", *(name for name in FORMS if name not in ("tiny_arc", "tiny_piqa"))]
    return load_tasks(names, str(write_forms(tmp_path_factory.mktemp("forms"))))


def requests_of(tasks: Any, names: Sequence[str]) -> Iterator[Any]:
    for name in names:
        task = tasks["tasks"][name]
        task.set_config(key="num_fewshot", value=task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests(rank=0, world_size=1)
        yield from task.instances


def order(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])


@pytest.mark.parametrize("setting", ["base", "arrow", "uniform"])
def test_choices_in_the_forms_of_arc_piqa_and_boolq_score_as_the_harness_scores_them(
    setting: str, pair: tuple[Any, Any], tasks: Any, routed: Any
) -> None:
    requests = list(requests_of(tasks, CHOICES))
    with routing(routed, setting):
        found, wanted = (model.loglikelihood(requests) for model in pair)
    assert len(found) == 23
    assert len({round(value, 3) for value, _ in wanted}) > 20
    for (value, is_greedy), (other, was_greedy) in zip(found, wanted, strict=True):
        assert value == pytest.approx(other, abs=1e-4)
        assert is_greedy == was_greedy
    rows: dict[tuple[str, int], list[int]] = {}
    for number, request in enumerate(requests):
        rows.setdefault((request.task_name, request.doc_id), []).append(number)
    for numbers in rows.values():
        assert order([found[i][0] for i in numbers]) == order([wanted[i][0] for i in numbers])


def test_results_are_those_of_the_harness_for_every_kind_of_task(pair: tuple[Any, Any], tasks: Any) -> None:
    from lorary.evaluate.harness import evaluate_tasks

    found, wanted = (evaluate_tasks(model, tasks, rows=None, shots=None, chat=False) for model in pair)
    assert found["results"].keys() == wanted["results"].keys() == {*FORMS, "tiny_group"}
    for task, own in wanted["results"].items():
        for metric, value in own.items():
            expected = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert found["results"][task][metric] == expected, (task, metric)
    assert found["n-shot"]["tiny_boolq"] == 1


def test_generation_defaults_of_the_base_play_no_part_in_an_answer(pair: tuple[Any, Any], routed: Any) -> None:
    request = Asked(("Name the colour of the sky:", {"until": ["zzz"], "max_gen_toks": 12}))
    plain = pair[0].generate_until([request])
    own = routed.generation_config
    own.repetition_penalty = 5.0
    assert pair[0].generate_until([request]) == plain
    assert pair[1].generate_until([request]) != plain
    assert routed.generation_config is own


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_logits_that_are_no_numbers_give_no_answer(kind: str, routed: Any, tokenizer: Any) -> None:
    from lorary.evaluate.harness import HarnessModel

    kept: list[Any] = []

    def recall(kind: str, task: str, requests: Sequence[Any], compute: Callable[[], list[Any]]) -> list[Any]:
        kept.append(compute())
        return kept[-1]

    args = {
        "loglikelihood": ("one", " blue"), "loglikelihood_rolling": ("one blue",),
        "generate_until": ("one", {"until": ["zzz"], "max_gen_toks": 2}),
    }  # fmt: skip
    model = HarnessModel(routed, tokenizer, recall)
    routed.model.norm.weight.data[0] = float("nan")
    with pytest.raises(BaseModelError, match="logits that are numbers"):
        getattr(model, kind)([Asked(args[kind])])
    assert kept == []


def test_a_continuation_that_is_ruled_out_has_no_log_likelihood(pair: tuple[Any, Any], routed: Any) -> None:
    def rule_out(_head: Any, _args: Any, logits: Any) -> Any:
        return logits.new_full(logits.shape, float("-inf")).index_fill(-1, torch.tensor([7]), 0.0)

    routed.get_output_embeddings().register_forward_hook(rule_out)
    with pytest.raises(BaseModelError, match=r"task 'made' must be finite numbers\nfound: 1 that are not, -inf"):
        pair[0].loglikelihood([Asked(("one", " blue"))])


ODD = [
    ("", "blue sky"),
    ("Name the colour  ", "blue"),
    ("Name the colour of", " the sky: a longer one"),
    ("one\n", "two"),
    ("word " * 90, "and more " * 20),
]


def test_odd_contexts_are_encoded_and_cut_as_the_harness_does(routed: Any, tokenizer: Any) -> None:
    from lorary.evaluate.harness import HFLM, HarnessModel

    routed.config.max_position_embeddings = 150  # so that the last is cut
    requests = [Asked(args) for args in ODD]
    found = HarnessModel(routed, tokenizer).loglikelihood(requests)
    wanted = HFLM(pretrained=routed, tokenizer=tokenizer).loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


@pytest.mark.parametrize(("context", "continuation"), [("one", ""), ("one", "word " * 200)])
def test_a_continuation_that_cannot_be_scored_is_refused(
    context: str, continuation: str, routed: Any, tokenizer: Any
) -> None:
    from lorary.evaluate.harness import HarnessModel

    routed.config.max_position_embeddings = 150
    with pytest.raises(TaskError, match="a continuation must have 1 to 150 tokens"):
        HarnessModel(routed, tokenizer).loglikelihood([Asked((context, continuation))])


def test_our_own_sums_without_eos_are_the_log_likelihoods_of_the_harness(
    pair: tuple[Any, Any], routed: Any, tokenizer: Any
) -> None:
    template = make_template("plain", tokenizer)
    rows = [("Name the colour of the sky:", option) for option in ("blue", "June and July", "three")]
    losses = answer_losses(routed, [template.encode(*row) for row in rows])
    wanted = pair[1].loglikelihood([Asked((source, f" {option}")) for source, option in rows])
    for loss, (value, _) in zip(losses, wanted, strict=True):
        assert -(loss.total - loss.eos) == pytest.approx(value, abs=1e-4)


def test_a_decision_for_a_request_sees_the_context_and_no_continuation(
    pair: tuple[Any, Any], routed: Any, tokenizer: Any
) -> None:
    source, asked = "Name the colour of the sky:", [" blue", " three more words"]
    with routing(routed, {"per": "request"}):
        found = pair[0].loglikelihood([Asked((source, continuation)) for continuation in asked])
        context = tokenizer(source, return_tensors="pt")["input_ids"]
        routed(input_ids=context)
        decided = routed._lorary.prober.requests[0].chosen.dense(3)[0].tolist()
    with routing(routed, {"experts": dict(zip("abc", decided, strict=True))}):
        wanted = pair[1].loglikelihood([Asked((source, continuation)) for continuation in asked])
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)


def test_unknown_tasks_and_data_that_is_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorary.evaluate import harness

    folder = write_forms(tmp_path / "forms")
    (folder / "tiny_piqa.jsonl").unlink()
    with pytest.raises(TaskError, match=r"the tasks must load: tiny_piqa\nfound: FileNotFoundError"):
        harness.load_tasks(["tiny_piqa"], str(folder))
    manager = harness.TaskManager
    # Those that come with the harness take seconds to look through.
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: manager(include_path=include_path, include_defaults=False)
    )
    with pytest.raises(TaskError, match=r"known to lm-evaluation-harness\nfound: no_such_task"):
        harness.load_tasks(["tiny_piqa", "no_such_task"], str(folder))


def test_cells_hold_every_metric_and_one_that_counts() -> None:
    from lorary.evaluate.harness_cells import cells_of, choose_primary

    found = {
        "results": {
            "a": {"acc,none": 0.5, "acc_stderr,none": 0.3, "acc_norm,none": 1.0, "acc_norm_stderr,none": "N/A"},
            "texts": {"alias": "texts", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
            "g": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_count": {"acc,none": 7}},
        },
        "group_subtasks": {"g": ["a", "texts"]},
        "higher_is_better": {"a": {"acc": True, "acc_norm": True}, "texts": {"word_perplexity": False}},
        "n-samples": {"a": {"original": 9, "effective": 4}, "texts": {"original": 3, "effective": 3}},
        "n-shot": {"a": 2},
    }  # fmt: skip
    labels = {"library": "lib", "router": "arrow", "template": "plain"}
    cells = choose_primary(cells_of(found, {"a": 1.0, "texts": 2.0}, {"a"}, **labels))
    assert [(c.task, c.metric, c.primary, c.n, c.seconds) for c in cells] == [
        ("a", "acc", True, 4, 1.0), ("a", "acc_norm", False, 4, 1.0), ("texts", "word_perplexity", False, 3, 2.0),
        ("g", "acc", True, 7, 3.0),
    ]  # fmt: skip
    assert (cells[0].low, cells[0].high) == (0.0, 1.0)
    assert (cells[1].stderr, cells[1].low, cells[1].high) == (None, 1.0, 1.0)
    assert cells[3].high == pytest.approx(0.5 + 1.96 * 0.1)
    assert [(c.split, c.shots) for c in cells] == [("held_in", 2), ("held_in", 2), ("held_out", 0), ("held_out", 0)]
    assert all(math.isfinite(cell.low) for cell in cells)
    assert json.dumps([cell.stderr for cell in cells])


def test_one_metric_of_a_task_counts_for_all_routers() -> None:
    from lorary.evaluate.harness_cells import cells_of, choose_primary

    def cells(router: str, mcc: float) -> list[Any]:
        found = {
            "results": {"cola": {"mcc,none": mcc, "acc,none": 0.6, "f1,none": 0.5}},
            "higher_is_better": {"cola": {"mcc": True, "acc": True, "f1": True}},
            "n-samples": {"cola": {"effective": 4}}, "n-shot": {},
        }  # fmt: skip
        return cells_of(found, {}, (), library="lib", router=router, template="plain")

    for base, metric in ((-0.02, "acc"), (0.02, "mcc")):
        primary = [c for c in choose_primary([*cells("base", base), *cells("arrow", 0.3)]) if c.primary]
        assert [(c.router, c.metric) for c in primary] == [("base", metric), ("arrow", metric)]


@pytest.mark.parametrize("options", [{"max_gen_toks": 256}, {"max_new_tokens": 300}, {}])
def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused_with_both_numbers(
    options: dict[str, Any], pair: tuple[Any, Any]
) -> None:
    asked = Asked(("one two", {"until": ["."], "do_sample": False, **options}))
    number = next(iter(options.values()), 256)
    with pytest.raises(TaskError, match=rf"task 'made' must leave room .* 256 positions\nfound: max_gen_toks {number}"):
        pair[0].generate_until([asked])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks of task 'made' must be a whole number above 0\nfound: 0"),
        ({"max_gen_toks": -1}, "max_gen_toks of task 'made' must be a whole number above 0"),
        ({"max_gen_toks": 4, "max_length": 1000}, "must fit the base's 256 positions\nfound: max_length 1000"),
    ],
)
def test_lengths_of_a_task_that_no_answer_can_have_are_refused(
    options: dict[str, Any], words: str, pair: tuple[Any, Any]
) -> None:
    with pytest.raises(TaskError, match=words):
        pair[0].generate_until([Asked(("one two", {"until": ["."], "do_sample": False, **options}))])
