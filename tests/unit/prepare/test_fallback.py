"""Evidence on what answers where no expert fits: measured on masked rows, kept, and read for requests like them."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.data.schema import Task
from lorary.data.tasks import load_tasks
from lorary.data.template import make_template
from lorary.errors import LibraryError
from lorary.evaluate.decisions import decide
from lorary.evaluate.loglik import answer_losses
from lorary.library.prepared import Prepared, group_key, save_prepared
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base
from lorary.model.fallback import Evidence, load_evidence, save_evidence
from lorary.prepare import fallback
from lorary.prepare.fallback import measure_fallback
from lorary.recipes import prepare as recipe

CHAT = "user: {% for m in messages %}{{ m['content'] }}{% endfor %} bot:"


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Task]:
    """Tasks a, b and c with three validation rows each; those of c have options."""
    path = tmp_path / "tasks.jsonl"
    made = [
        {"task": name, "split": split, "source": f"{name} {i} {split}:", "target": "up"}
        | ({"options": ["up", "down"]} if name == "c" else {})
        for name in "abc"
        for split in ("train", "val", "test")
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return load_tasks(path)


@pytest.fixture
def experts(tmp_path: Path, base: Base, random_adapter: Callable[..., Any], generator: torch.Generator) -> Library:
    library = Library.create(tmp_path / "lib", base.model, base_name="tiny")
    for name in "abc":
        library.add_adapter(random_adapter(base.model, name, generator), {"tasks": [name]})
    return library


@pytest.fixture
def bare(base: Base) -> Iterator[Base]:
    yield base
    if hasattr(base.model, "_lorary"):
        detach(base.model)


@pytest.fixture
def chatting(base: Base, monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.setattr(base.tokenizer, "chat_template", CHAT)
    return base


def test_losses_without_the_tasks_own_expert_are_compared_with_those_of_the_base(
    chatting: Base, experts: Library, rows: dict[str, Task]
) -> None:
    evidence = measure_fallback(chatting, experts, rows, num_rows=2)
    assert evidence is not None
    assert len(evidence.vectors) == len(evidence.advantages) == 6  # two rows each, those with options too
    attach(chatting.model, experts, router="base")
    expected = []
    for name, others in (("a", ["b", "c"]), ("b", ["a", "c"]), ("c", ["a", "b"])):
        losses = []
        for setting, template in (({"router": "uniform", "allow": others}, "plain"), ("base", "chat")):
            made = make_template(template, chatting.tokenizer, max_length=99)
            examples = [made.encode(row.prompt, row.target) for row in rows[name].split("val")[:2]]
            with routing(chatting.model, setting):
                losses.append([loss.mean for loss in answer_losses(chatting.model, examples)])
        expected += [base - mean for mean, base in zip(*losses, strict=True)]
    detach(chatting.model)
    assert evidence.advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_evidence_is_kept_for_these_experts_and_measured_anew_for_others(
    chatting: Base, experts: Library, rows: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure_fallback(chatting, experts, rows)
    assert first is not None
    with monkeypatch.context() as patch:
        patch.setattr(fallback, "answer_losses", lambda *_: pytest.fail("what is there is not measured again"))
        again = measure_fallback(chatting, experts, rows)
    assert again is not None
    assert torch.equal(again.advantages, first.advantages.float())
    experts.remove("c")
    assert load_evidence(experts) is None


def test_nothing_is_measured_where_nothing_can_be(chatting: Base, experts: Library, rows: dict[str, Task]) -> None:
    assert measure_fallback(chatting, experts, {}) is None
    bare = replace(chatting)
    bare.tokenizer.chat_template = None
    assert measure_fallback(bare, experts, rows) is None
    assert load_evidence(experts) is None


def test_requests_like_the_prompts_follow_them_and_others_go_to_the_base() -> None:
    draw = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 64, generator=draw)
    noise = 0.05 * torch.randn(12, 64, generator=draw)
    evidence = Evidence(kinds.repeat_interleave(4, dim=0) + noise, torch.tensor([2.0, -2.0, 0.1]).repeat_interleave(4))
    requests = torch.cat([kinds, torch.randn(1, 64, generator=draw)])
    # The mean did much better on the first kind, much worse on the second, hardly better on the third.
    assert evidence.prefers_mean(requests).tolist() == [True, False, False, False]
    assert torch.equal(evidence.prefers_mean(3 * requests.half()), evidence.prefers_mean(requests))


def test_evidence_is_read_once_so_that_a_routed_model_needs_its_folder_no_more(
    bare: Base, experts: Library, rows: dict[str, Task]
) -> None:
    ids = tuple(bare.tokenizer("a 0 val:")["input_ids"])
    attach(bare.model, experts, router="base")
    with torch.no_grad():
        vector = bare.model.model(input_ids=torch.tensor([ids])).last_hidden_state.mean(dim=1)
    detach(bare.model)
    save_evidence(experts, Evidence(torch.cat([vector, -vector]), torch.tensor([9.0, -9.0])), {})
    lost = {"router": "arrow", "per": "request", "threshold": 1e9, "fallback": "chat"}
    attach(bare.model, experts, **lost)
    shutil.rmtree(experts.path)
    with routing(bare.model, {"top_k": 1}):
        (decision,) = decide(bare.model, [ids])
    assert decision.is_lost
    assert decision.prefers_mean


def test_evidence_that_does_not_fit_together_is_refused(experts: Library) -> None:
    tensors = {"vectors": torch.zeros(3, 4), "advantages": torch.zeros(2)}
    save_prepared(experts, "fallback", group_key(experts, experts.names()), Prepared(tensors, {}, {}))
    with pytest.raises(LibraryError, match=r"must hold a vector and a number for each prompt"):
        load_evidence(experts)


def test_preparing_the_default_router_measures_it_too(
    base: Base, experts: Library, rows: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.tokenizer, "chat_template", CHAT)
    monkeypatch.setattr(recipe, "load_base", lambda *_args, **_kwargs: base)
    recipe.run_prepare(str(experts.path), "discriminant", tasks=str(tmp_path / "tasks.jsonl"))
    assert load_evidence(experts) is None
    recipe.run_prepare(str(experts.path), "auto", tasks=str(tmp_path / "tasks.jsonl"))
    assert load_evidence(experts) is not None


def test_a_request_far_from_all_prompts_goes_to_the_base_and_one_prompt_does_not_outvote_others() -> None:
    draw = torch.Generator().manual_seed(0)
    kinds, far = torch.randn(3, 64, generator=draw), torch.randn(5, 64, generator=draw)
    better = Evidence(kinds.repeat_interleave(8, dim=0), torch.full((24,), 2.0))
    assert better.prefers_mean(kinds).all()
    assert not better.prefers_mean(far).any()
    one_of_four = torch.tensor([50.0, -0.9, -0.9, -0.9]).repeat(3)
    assert not Evidence(kinds.repeat_interleave(4, dim=0), one_of_four).prefers_mean(kinds).any()
