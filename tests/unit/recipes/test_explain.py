"""What `lorary explain` computes: traces, what is left out, counterfactuals against libraries without the expert."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.adapter import LoraFactors
from lorary.data.template import make_template
from lorary.data.text_of_ids import texts_of_ids
from lorary.errors import LoraryError, RouterError, TaskError, UsageError
from lorary.evaluate.explain_library import explain_library, without_expert
from lorary.evaluate.explain_trace import FIRST_TOKEN
from lorary.evaluate.explanation import Explanation
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.prompts import Prompt, read_prompts
from lorary.evaluate.routing import SINK_RATIO
from lorary.evaluate.settings import ExplainSettings
from lorary.library.store import Library
from lorary.model.attach import attach
from lorary.model.base import Base, load_base
from lorary.model.seating import seating
from lorary.report.explain_text import print_explanation
from lorary.report.explanation_json import explanation_json
from lorary.route.setting import Routing

Make = Callable[..., Any]
TEXT = Prompt("Name the colour of the sky:", "blue")


def explain(base: Base, prompts: list[Prompt], template: str, **settings: Any) -> Explanation:
    return explain_library(base, prompts, template, ExplainSettings(**settings))


@pytest.fixture
def fresh(tiny_base_folder: Path) -> Make:
    """A base of its own for each model that is routed."""
    return lambda: load_base(str(tiny_base_folder))


@pytest.fixture
def adapters(tiny_model: Make, random_adapter: Make, generator: torch.Generator) -> dict[str, Any]:
    """Four experts; 'd' adapts the second layer only."""
    model = tiny_model()
    made = {name: random_adapter(model, name, generator) for name in "abc"}
    return {**made, "d": random_adapter(model, "d", generator, layers=[1])}


@pytest.fixture
def routed(fresh: Make, adapters: dict[str, Any], tmp_path: Path) -> Make:
    """`routed("abc", router="arrow", top_k=2)`: a base with a library of these experts seated."""

    def make(names: str = "abcd", **settings: Any) -> Base:
        base = fresh()
        path = tmp_path / f"lib-{names}"
        fits = path.exists()
        library = Library.open(path) if fits else Library.create(path, base.files.name)
        for name in [] if fits else names:
            library.add_adapter(adapters[name], {"tasks": [name]})
        attach(base.model, library, **{"top_k": 2, **settings})
        return base

    return make


def loss_of(base: Base, prompt: Prompt = TEXT) -> float:
    """Log-likelihood by the evaluation's own path."""
    example = make_template("plain", base.tokenizer).encode(prompt.text, prompt.answer or "")
    return -answer_losses(base.model, [example])[0].total


def test_all_that_the_model_reads_is_traced_and_the_first_token_does_not_count(routed: Make) -> None:
    base = routed()
    found = explain(base, [TEXT], "plain")
    (prompt,) = found.prompts
    example = make_template("plain", base.tokenizer).encode(TEXT.text, "blue")
    assert "".join(token.text for token in prompt.tokens) == "Name the colour of the sky: blue"
    parts = [token.part for token in prompt.tokens]
    assert parts == ["prompt"] * len(example.prompt_ids) + ["answer"] * (len(example.target_ids) - 1)
    assert [token.left_out for token in prompt.tokens] == [FIRST_TOKEN] + [""] * (len(parts) - 1)
    assert prompt.weights is not None
    assert prompt.weights.shape == (6, len(parts), 4)
    assert torch.allclose(prompt.weights.sum(-1), torch.ones(6, len(parts)))
    assert torch.allclose(found.overall.measures.usage.float(), prompt.weights[:, 1:].mean(dim=(0, 1)), atol=1e-6)
    assert [use.layers for use in found.uses] == [6, 6, 6, 3]
    assert (prompt.is_given, prompt.is_finished, prompt.num_answer) == (True, True, len(example.target_ids))


def test_an_answer_of_its_own_is_greedy_and_scored_by_the_very_tokens(routed: Make) -> None:
    base = routed()
    found = explain(base, [Prompt(TEXT.text)], "plain", max_new_tokens=3)
    (prompt,) = found.prompts
    ids = torch.tensor([make_template("plain", base.tokenizer).encode_prompt(TEXT.text)])
    total, made = 0.0, []
    with torch.no_grad():
        for _ in range(3):
            logits = base.model(input_ids=torch.cat([ids, torch.tensor([made], dtype=torch.int64)], 1)).logits[0, -1]
            made.append(int(logits.argmax()))
            total += float(logits.log_softmax(-1).max())
            if made[-1] == base.tokenizer.eos_token_id:
                break
    assert prompt.num_answer == len(made)
    assert found.log_likelihood == pytest.approx([total], abs=1e-4)
    assert prompt.is_finished == (made[-1] == base.tokenizer.eos_token_id)
    assert not prompt.is_given


@pytest.mark.parametrize("setting", [{}, {"router": "projection", "per": "request"}, {"router": "uniform"}])
def test_without_an_expert_is_the_library_that_never_had_it(routed: Make, setting: dict[str, Any]) -> None:
    found = explain(routed(**setting), [TEXT], "plain", without=("b", "d"))
    whole = loss_of(routed(**setting))
    assert found.log_likelihood == pytest.approx([whole], abs=1e-4)
    by_name = {one.name: one for one in found.without_each}
    for name, rest in (("b", "acd"), ("d", "abc")):
        alone = loss_of(routed(rest, **setting))
        assert by_name[name].log_likelihood == pytest.approx([alone], abs=1e-4)
        assert by_name[name].change == pytest.approx(alone - whole, abs=2e-4)
    assert found.base == pytest.approx([loss_of(routed(router="base"))], abs=1e-4)
    changes = [one.change for one in found.without_each]
    assert changes == sorted(changes)


def test_the_most_used_experts_are_taken_out_by_default(routed: Make) -> None:
    found = explain(routed(), [TEXT], "plain", most=2)
    assert set(found.without) == {found.experts[i] for i in found.ranked()[:2]}
    assert explain(routed(), [TEXT], "plain", most=0).without == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Routing(), Routing.of(allow=["b", "c"])),
        (Routing.of(allow=["a", "c"]), Routing.of(allow=["c"])),
        (Routing.of(general=["c"]), Routing.of(general=["c"], allow=["b"])),
        (Routing.of(allow=["a"]), Routing.of("base", allow=["a"])),
        (Routing.of(experts=["a", "b"]), Routing.of(experts=["b"])),
        (Routing.of(experts={"a": 0.5, "b": 0.2}), Routing.of(experts={"b": 0.2})),
        (Routing.of(experts=["a"]), Routing.of("base")),
        (Routing.of(experts=["b"]), Routing.of(experts=["b"])),
    ],
)
def test_taking_an_expert_out_changes_nothing_else_in_the_settings(before: Routing, after: Routing) -> None:
    assert without_expert(before, "a", ["a", "b", "c"]) == after


@pytest.mark.parametrize(
    ("setting", "fixed"),
    [
        ({"router": "uniform"}, {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}),
        ({"router": "base"}, {}),
        ({"experts": {"a": -0.5, "d": 2.0}}, {"a": -0.5, "d": 2.0}),
    ],
)
def test_a_router_that_decides_nothing_says_so_and_still_knows_what_experts_are_worth(
    routed: Make, setting: dict[str, Any], fixed: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    found = explain(routed(**setting), [TEXT], "plain", against="arrow")
    assert (found.decides, found.compares, dict(found.fixed or {})) == (False, False, fixed)
    assert set(found.without) == set(fixed)
    document = explanation_json(found)
    assert "overall" not in document
    assert document["prompts"][0]["weights"] == {}
    print_explanation(found)
    assert "decides nothing" in " ".join(capsys.readouterr().out.split())


def test_general_experts_are_out_of_reach_and_a_constant_router_over_them_decides_nothing(routed: Make) -> None:
    found = explain(routed(general=["c"]), [TEXT], "plain")
    assert [use.verdict == "out of reach" for use in found.uses] == [False, False, True, False]
    constant = explain(routed(router="uniform", general=["c"]), [TEXT], "plain", against="arrow", most=1)
    assert (constant.layers, constant.decides, constant.compares) == ([], False, False)


def test_a_router_agrees_with_itself_and_less_with_another(routed: Make) -> None:
    same = explain(routed(), [TEXT], "plain", against="arrow")
    assert same.overall.agreement == pytest.approx((1, 1, 0))
    assert same.against_other is not None
    assert same.against_other.change == pytest.approx(0, abs=1e-5)
    other = explain(routed(), [TEXT], "plain", against="norm")
    assert other.overall.agreement is not None
    assert other.overall.agreement.divergence > 0
    assert explain(routed(), [TEXT], "plain", against="base").compares is False


def test_an_only_expert_is_chosen_everywhere_and_without_it_there_is_the_base(routed: Make) -> None:
    found = explain(routed("a"), [TEXT], "plain")
    assert (found.overall.measures.entropy, found.uses[0].verdict) == (0, "")
    assert found.without["a"] == pytest.approx(found.base)


def test_experts_that_are_zero_never_chosen_or_not_allowed_are_named(
    routed: Make, adapters: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    zero = {p: LoraFactors(f.lora_a, torch.zeros_like(f.lora_b), f.scaling) for p, f in adapters["c"]}
    adapters["c"] = replace(adapters["c"], modules=zero)
    found = explain(routed(allow=["a", "c", "d"]), [TEXT], "plain")
    verdicts = dict(zip(found.experts, (use.verdict for use in found.uses), strict=True))
    assert (verdicts["b"], verdicts["c"]) == ("out of reach", "dead")
    print_explanation(found)
    printed = capsys.readouterr().out
    assert "dead: c" in printed
    assert "out of reach: b" in printed


def test_a_token_of_huge_norm_is_shown_and_left_out(routed: Make) -> None:
    base = routed()
    ids = make_template("plain", base.tokenizer).encode_prompt(TEXT.text)
    base.model.get_input_embeddings().weight.data[ids[3]] *= 1000
    found = explain(base, [TEXT], "plain")
    huge = [i for i, token in enumerate(ids) if token == ids[3]]
    assert len(huge) < len(ids) / 2
    left_out = [i for i, token in enumerate(found.prompts[0].tokens) if "times the median" in token.left_out]
    assert left_out == huge
    assert float(found.prompts[0].tokens[3].left_out.split()[1]) > SINK_RATIO
    assert found.shares.shape[1] == len(found.prompts[0].tokens) - 1 - len(huge)


def test_several_prompts_are_pooled_token_by_token_and_answers_summed(routed: Make) -> None:
    other = Prompt("Add one and two:", "three")
    both, one, two = (
        explain(routed(), prompts, "plain", without=("a",)) for prompts in ([TEXT, other], [TEXT], [other])
    )
    counts = [single.shares.shape[1] for single in (one, two)]
    pooled = (one.overall.measures.usage * counts[0] + two.overall.measures.usage * counts[1]) / sum(counts)
    assert torch.allclose(both.overall.measures.usage, pooled, atol=1e-6)
    assert both.without_each[0].change == pytest.approx(
        one.without_each[0].change + two.without_each[0].change, abs=1e-3
    )


def test_the_document_is_json_and_its_weights_are_those_of_the_trace(
    routed: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explain(routed(), [TEXT], "plain", against="norm")
    document = json.loads(json.dumps(explanation_json(found), allow_nan=False))
    (prompt,) = document["prompts"]
    weights = found.prompts[0].weights
    assert weights is not None
    for path, own in zip(found.layers, weights, strict=True):
        for token, listed in zip(own, prompt["weights"][path], strict=True):
            dense = torch.zeros(4).index_put_(
                (torch.tensor([int(e) for e, _ in listed]),), torch.tensor([w for _, w in listed])
            )
            assert torch.allclose(dense, token, atol=1e-5)
    assert [layer["module"] for layer in document["layers"][:3]] == [
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
    ]
    assert document["layers"][0]["agreement"].keys() == {"top1", "overlap", "divergence"}
    assert document["overall"]["left_out"] == 1
    print_explanation(found)
    printed = capsys.readouterr().out
    assert "agreement with norm" in printed
    assert "answer (given): blue" in printed


def test_a_character_of_several_tokens_stands_at_its_last_one(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("a ü😀")["input_ids"]
    texts = texts_of_ids(tiny_tokenizer, ids)
    assert "".join(texts) == "a ü😀"
    assert texts[-1] == "😀"
    assert "\N{REPLACEMENT CHARACTER}" in texts_of_ids(tiny_tokenizer, ids[:-1])[-1]


def test_weights_that_are_no_numbers_are_refused_with_their_layer(routed: Make) -> None:
    base = routed()
    layer = seating(base.model).layers["model.layers.1.self_attn.q_proj"]
    layer.lora.down[0] = torch.nan
    layer.lora.down[layer.lora.num_ranks :] = torch.nan
    with pytest.raises(RouterError, match=r"finite numbers, at layer 'model\.layers\.1\.self_attn\.q_proj'"):
        explain(base, [TEXT], "plain")


def test_an_answer_without_a_finite_likelihood_is_refused(routed: Make) -> None:
    found = explain(routed(), [TEXT], "plain", most=0)
    with pytest.raises(RouterError, match=r"must be finite, under 'the base' too\nfound: \[nan\]"):
        replace(found, base=[float("nan")])


def test_a_row_of_one_token_has_no_token_that_counts(routed: Make) -> None:
    with pytest.raises(UsageError, match="need a token that counts"):
        explain(routed(), [Prompt("N")], "plain", max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "options", "match"),
    [
        (Prompt("  "), {}, "--prompt must hold text"),
        (Prompt("\udcff"), {}, "--prompt must be valid Unicode"),
        (Prompt("a", " "), {}, "--answer must hold text"),
        (Prompt("a " * 300), {}, "must fit the 256 positions"),
        (Prompt("a", "b " * 300), {}, "must fit the 256 positions"),
        (Prompt("a"), {"without": ["a", "z"]}, r"--without must name experts of the library\nfound: \['z'\]"),
        (Prompt("a"), {"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        (Prompt("a"), {"most": -1}, "--most must be at least 0"),
        (Prompt("a"), {"experts": []}, "--experts must name an expert"),
        (Prompt("a"), {"against": "nobody"}, "a router must exist"),
    ],
)
def test_wrong_input_is_refused(
    routed: Make, tmp_path: Path, prompt: Prompt, options: dict[str, Any], match: str
) -> None:
    routed("ab")
    with pytest.raises(LoraryError, match=match):
        lorary.explain(str(tmp_path / "lib-ab"), [prompt], **options)


def test_prompts_are_read_from_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"answer": "c", "prompt": "b"}\n')
    assert read_prompts(str(path)) == [Prompt("a"), Prompt("b", "c")]


@pytest.mark.parametrize(
    ("line", "kind", "match"),
    [
        ("", TaskError, "must hold a prompt"),
        ('"a"', TaskError, r"prompts\.jsonl:1: a line must be an object"),
        ('{"answer": "a"}', TaskError, "must be an object with 'prompt'"),
        ('{"prompt": "a", "colour": "b"}', TaskError, "and nothing else"),
        ('{"prompt": "a", "source": "b"}', TaskError, "and nothing else"),
        ('{"prompt": "a", "task": "b"}', TaskError, "and nothing else"),
        ('{"prompt": "a", "target": "b", "answer": "c"}', TaskError, "and nothing else"),
        ('{"prompt": 3}', TaskError, "must be strings"),
        ('{"prompt": "a", "answer": ""}', UsageError, r":1: 'answer' must hold text"),
        ("{", TaskError, "valid JSON"),
    ],
)
def test_other_lines_are_refused_with_their_place(tmp_path: Path, line: str, kind: type, match: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(kind, match=match):
        read_prompts(str(path))
    with pytest.raises(UsageError, match="the prompts file must exist"):
        read_prompts(str(tmp_path / "none.jsonl"))


def test_there_must_be_a_prompt(routed: Make, tmp_path: Path) -> None:
    routed("ab")
    with pytest.raises(UsageError, match="there must be a prompt"):
        lorary.explain(str(tmp_path / "lib-ab"), [])


def test_an_explanation_of_other_shapes_is_refused(routed: Make) -> None:
    found: Explanation = explain(routed(), [TEXT], "plain", most=0)
    with pytest.raises(LoraryError, match=r"must be \(layers, tokens, experts\)"):
        replace(found, experts=["a"])
