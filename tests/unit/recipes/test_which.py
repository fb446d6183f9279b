"""`lorary which`: answers side by side are those that each candidate gives by itself."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lorary
from lorary.data.template import make_template
from lorary.errors import LibraryError, LoraryError, RouterError, TaskError, UsageError
from lorary.evaluate.completion import answer
from lorary.evaluate.loglik import answer_losses
from lorary.evaluate.prompts import Prompt, read_prompts
from lorary.evaluate.settings import WhichSettings
from lorary.evaluate.which import CandidateAnswer, PromptAnswers, which_library
from lorary.library.store import Library
from lorary.model.attach import attach, detach
from lorary.model.base import Base, load_base
from lorary.recipes.which import which
from lorary.report.which_text import print_which

Make = Callable[..., Any]
PROMPT = Prompt("Name the colour of the sky:", "blue")


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder))


@pytest.fixture
def library(tiny_model: Make, random_adapter: Make, generator: torch.Generator, tmp_path: Path, base: Base) -> Library:
    """Three experts, 'c' in one layer alone and of another rank."""
    made = Library.create(tmp_path / "lib", base.files.name)
    model = tiny_model()
    for name, settings in (("a", {}), ("b", {}), ("c", {"layers": [1], "rank": 2})):
        made.add_adapter(random_adapter(model, name, generator, size=3.0, **settings), {"tasks": [name]})
    return made


def alone(base: Base, library: Library, **setting: Any) -> tuple[str, int, float]:
    """Text, number of tokens and loss of the reference under one setting in force for the whole model."""
    attach(base.model, library, **setting)
    made = answer(base, PROMPT.text, "plain", max_new_tokens=6)
    example = make_template("plain", base.tokenizer).encode(PROMPT.text, str(PROMPT.answer))
    (loss,) = answer_losses(base.model, [example])
    detach(base.model)
    return made.text, made.num_tokens, loss.mean


@pytest.mark.parametrize(
    "route", [{"router": "arrow", "top_k": 2}, {"router": "arrow", "per": "request"}, {"router": "uniform"},
              {"router": "base"}, {"experts": ["a", "c"]}, {"router": "norm", "general": ["c"]},
              {"router": "arrow", "allow": ["b"]}],
)  # fmt: skip
def test_each_answer_and_loss_is_that_of_the_candidate_by_itself(
    base: Base, library: Library, route: dict[str, Any]
) -> None:
    (asked,) = which_library(base, library, [PROMPT], WhichSettings(max_new_tokens=6), **route).prompts
    settings = {asked.router.name: route, "base": {"router": "base"}, **{name: {"experts": [name]} for name in "abc"}}
    assert {(a.kind, a.name) for a in asked.answers[:2]} == {("router", asked.router.name), ("base", "base")}
    assert sorted(a.name for a in asked.experts) == ["a", "b", "c"]
    for candidate in asked.answers:
        own = route if candidate.kind == "router" else settings[candidate.name]
        text, num_tokens, loss = alone(base, library, **own)
        assert (candidate.text, candidate.num_tokens) == (text, num_tokens)
        assert candidate.loss == pytest.approx(loss, abs=1e-4)
    assert len({candidate.text for candidate in asked.answers}) > 1


def test_a_prompt_that_fits_no_expert_is_the_bases_in_its_own_template(base: Base, library: Library) -> None:
    base.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    route: dict[str, Any] = {"router": "arrow", "per": "request", "threshold": 1e9, "fallback": "chat"}
    (asked,) = which_library(base, library, [PROMPT], WhichSettings(max_new_tokens=6), **route).prompts
    text, num_tokens, _ = alone(base, library, **route)
    assert (asked.router.text, asked.router.num_tokens) == (text, num_tokens)
    (loss,) = answer_losses(base.model, [make_template("chat", base.tokenizer).encode(PROMPT.text, "blue")])
    assert asked.router.loss == pytest.approx(loss.mean, abs=1e-4)
    assert asked.router.loss != pytest.approx(asked.base.loss, abs=1e-3)
    assert (asked.base.weight, [a.weight for a in asked.experts]) == (1.0, [0.0] * 3)
    assert asked.verdict.startswith("arrow finds no expert that fits and asks the base in its own chat template; ")
    assert "no expert fits" in asked.reason
    assert asked.to_json()["confidence"] == asked.confidence


def test_experts_that_do_not_fit_one_batch_answer_in_several(
    base: Base, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = which_library(base, library, [PROMPT], WhichSettings(max_new_tokens=6), router="arrow")
    monkeypatch.setattr("lorary.evaluate.which.MAX_TOKENS", 80)
    parts = which_library(base, library, [PROMPT], WhichSettings(max_new_tokens=6), router="arrow")
    assert [a.text for a in parts.prompts[0].answers] == [a.text for a in whole.prompts[0].answers]


def test_weights_are_shares_of_the_prompt_and_lead_to_the_verdict(base: Base, library: Library) -> None:
    (asked,) = which_library(
        base, library, [Prompt(PROMPT.text)], WhichSettings(max_new_tokens=6), router="arrow", top_k=1
    ).prompts
    weights = [a.weight for a in asked.experts]
    assert weights == sorted(weights, reverse=True)
    assert sum(weights) + (asked.base.weight or 0.0) == pytest.approx(1.0)
    assert asked.router.weight is None
    pattern = r"arrow gives \d+ % to '[abc]' and answers (as it does|otherwise); [0-3] of 3 experts give the same "
    assert re.fullmatch(pattern + r"answer; the base answers (the same|otherwise)\.", asked.verdict)
    assert [a.loss for a in asked.answers] == [None] * 5


def made(
    texts: dict[str, str], weights: dict[str, float], reference: str | None = None, decides: bool = True
) -> PromptAnswers:
    losses = dict(zip(texts, (3.0, 2.0, 0.5, 1.0), strict=True)) if reference else dict.fromkeys(texts)
    kinds = ["router", "base", *["expert"] * (len(texts) - 2)]
    answers = [
        CandidateAnswer(name, kind, text, 1, True, weights.get(name), losses[name])
        for (name, text), kind in zip(texts.items(), kinds, strict=True)
    ]
    return PromptAnswers("p", reference, decides, answers, 0.0)


def test_the_verdict_says_whom_the_router_follows_and_who_is_right() -> None:
    asked = made({"arrow": "x", "base": "y", "s": "x ", "t": "z"}, {"base": 0.0, "s": 0.62, "t": 0.38})
    assert asked.verdict == (
        "arrow gives 62 % to 's' and answers as it does; 1 of 2 experts give the same answer; "
        "the base answers otherwise."
    )
    asked = made({"arrow": "x", "base": "x", "s": "z", "t": "z"}, {"base": 0.7, "s": 0.2, "t": 0.1}, reference="z")
    assert asked.verdict == (
        "arrow gives 70 % to the base and answers as it does; 0 of 2 experts give the same answer; the base answers "
        "the same; the reference is the answer of 2 experts, and has its lowest loss under 's' (0.50 nats a token)."
    )
    asked = made(
        {"uniform": "x", "base": "y", "s": "y", "t": "y"}, {"base": 0.0, "s": 0.5, "t": 0.5}, "q", decides=False
    )
    assert asked.verdict.startswith("uniform weighs all experts alike, whatever the prompt; 0 of 2")
    assert "nobody gives the reference" in asked.verdict


def test_the_base_is_left_as_it_was_also_after_a_failure(base: Base, library: Library) -> None:
    before = set(vars(base.model))
    which_library(base, library, [PROMPT], WhichSettings(max_new_tokens=2))
    with pytest.raises(UsageError, match="must fit the 256 positions"):
        which_library(base, library, [PROMPT, Prompt("x " * 300)], WhichSettings(max_new_tokens=2))
    assert set(vars(base.model)) == before


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "match"),
    [
        ([], {}, UsageError, "there must be a prompt"),
        ([Prompt(" ")], {}, UsageError, "--prompt must hold text"),
        ([Prompt("a", "")], {}, UsageError, "--answer must hold text"),
        ([PROMPT], {"max_new_tokens": 0}, UsageError, "--max-new-tokens"),
        ([PROMPT], {"router": "arow"}, RouterError, "did you mean 'arrow'"),
        ([PROMPT], {"experts": []}, UsageError, "--experts must name an expert"),
        ([PROMPT], {"template": "chat"}, LoraryError, "chat template"),
    ],
)
def test_wrong_input_is_refused(
    library: Library, prompts: list[Prompt], options: dict[str, Any], kind: type, match: str
) -> None:
    with pytest.raises(kind, match=match):
        which(library.path, prompts, **options)


def test_a_library_without_adapters_is_refused(tiny_base_folder: Path, tmp_path: Path) -> None:
    Library.create(tmp_path / "empty", tiny_base_folder)
    with pytest.raises(LibraryError, match="must hold an adapter"):
        which(tmp_path / "empty", [PROMPT])


def test_the_table_shows_the_experts_of_the_largest_weights(
    library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    result = which(library.path, [replace(PROMPT, text="[bold]" + PROMPT.text)], max_new_tokens=3)
    print_which(result, top=1)
    shown = capsys.readouterr().out
    assert "2 more experts" in shown
    assert "[bold]Name the colour" in shown
    assert "loss" in shown
    assert result.prompts[0].verdict.split(";")[0] in " ".join(shown.split())
    print_which(result)
    assert "more experts" not in capsys.readouterr().out


def test_the_document_has_all_answers(library: Library) -> None:
    document = json.loads(json.dumps(which(library.path, [PROMPT], max_new_tokens=3).to_json()))
    (prompt,) = document["prompts"]
    assert [a["kind"] for a in prompt["answers"]] == ["router", "base", "expert", "expert", "expert"]
    assert set(prompt["weights"]) == {"a", "b", "c"}
    assert {"library", "base", "router", "template", "settings", "seconds"} <= set(document)
    assert document["seconds"]["load"] > 0


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "a: \r\n\n  b\n", [Prompt("a: "), Prompt("  b")]),
        ("p.txt", '{"prompt": "a", "target": "b"}\n', [Prompt("a", "b")]),
        ("p.jsonl", '\ufeff{"source": "a", "target": "b", "task": "t", "split": "test"}', [Prompt("a", "b")]),
        ("p.jsonl", '{"prompt": "a", "completion": "b"}\n{"source": "c"}', [Prompt("a", "b"), Prompt("c")]),
        ("p.txt", "[1]\n", [Prompt("[1]")]),
    ],
)
def test_prompts_are_lines_or_objects(tmp_path: Path, name: str, text: str, expected: list[Prompt]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(str(tmp_path / name)) == expected


def test_prompts_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\xff\n")
    with pytest.raises(TaskError, match="must be UTF-8"):
        read_prompts(str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_text("\n \n")
    with pytest.raises(TaskError, match="must hold a prompt"):
        read_prompts(str(tmp_path / "p.txt"))


def test_the_door_takes_paths_and_what_is_open(base: Base, library: Library, tmp_path: Path) -> None:
    by_path = lorary.which(library.path, PROMPT.text, answer=PROMPT.answer, max_new_tokens=3)
    in_memory = lorary.which(library, [PROMPT.text, PROMPT], base=base, max_new_tokens=3)
    assert [a.text for a in by_path.prompts[0].answers] == [a.text for a in in_memory.prompts[0].answers]
    assert (by_path.prompts[0].reference, in_memory.prompts[1].reference) == (PROMPT.answer, PROMPT.answer)
    (tmp_path / "prompts.txt").write_text(PROMPT.text)
    assert lorary.which(library, tmp_path / "prompts.txt", base=base, max_new_tokens=3).prompts[0].reference is None
    with pytest.raises(UsageError, match="max_new_tokens"):
        lorary.which(library, PROMPT, base=base, max_new_token=3)


def test_the_result_shows_itself_as_tables(base: Base, library: Library) -> None:
    result = lorary.which(library, Prompt("<b>" + PROMPT.text, "x"), base=base, max_new_tokens=3, router="arrow")
    assert "router arrow" in repr(result)
    assert result.prompts[0].verdict in repr(result)
    assert "<b>" not in result._repr_html_()
    assert len(result.records()) == 5
    assert set(result.records()[0]) >= {"prompt", "reference", "name", "kind", "text", "weight", "loss"}
