"""Deciding by text alone: as with the base model, which is never loaded."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.errors import RouterError, UsageError
from lorary.evaluate.decisions import decide
from lorary.library.prepared import Prepared, expert_key, save_prepared
from lorary.library.store import Library
from lorary.model import features as features_module
from lorary.model.attach import attach
from lorary.route.setting import Routing
from lorary.serve import versions
from lorary.serve.engine import Job
from lorary.serve.text_decider import TextDecider

Make = Callable[..., Any]
TEXTS = ["Name the sky", "Add one", "Which month follows May, and which the sky?"]


def embed(texts: list[str]) -> Tensor:
    return torch.nn.functional.normalize(
        torch.stack([torch.tensor([1.0, 3.0 * ("sky" in text), 2.0 * ("May" in text)]) for text in texts])
    )


@pytest.fixture
def library(
    tiny_model: Make, random_adapter: Make, generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Library:
    """Four experts of which one does nothing; what they know of texts is prepared."""
    monkeypatch.setattr(features_module, "embed_texts", embed)
    model = tiny_model()
    made = Library.create(tmp_path / "lib", model, base_name="tiny")
    corners = {"a": (1.0, 0.0, 0.0), "b": (0.1, 1.0, 0.0), "c": (0.0, 0.0, 1.0), "zero": (1.0, 3.0, 0.0)}
    for name, corner in corners.items():
        made.add_adapter(random_adapter(model, name, generator, size=float(name != "zero")), {"tasks": [name]})
        rows = torch.tensor(corner) + 0.05 * torch.randn(12, 3, generator=generator)
        for kind, value in (("retrieval_text", torch.tensor(corner)), ("samples_text", rows)):
            save_prepared(made, kind, expert_key(made, name), Prepared({"request": value}, {}, {}))
    return made


@pytest.mark.parametrize(
    "setting",
    [
        {"router": "retrieval", "top_k": 1},
        {"router": "retrieval", "top_k": 2, "threshold": 0.9, "fallback": "a", "allow": ["a", "b"]},
        {"router": "retrieval", "top_k": 1, "threshold": 0.99, "fallback": "uniform"},
        {"router": "discriminant", "top_k": 1, "threshold": 0.0, "fallback": "chat"},
    ],
    ids=str,
)
def test_decisions_are_those_of_the_routed_model(
    library: Library, tiny_model: Make, tiny_tokenizer: Any, setting: dict[str, Any]
) -> None:
    routing = Routing.of(**setting, features="text")
    model = attach(tiny_model(), library, tokenizer=tiny_tokenizer, **routing.fields())
    prompts = [tuple(tiny_tokenizer(text)["input_ids"]) for text in TEXTS]
    ours = decide(model, prompts)
    decider = TextDecider(library, tiny_tokenizer)
    decided = asyncio.run(decider.decide(routing, prompts))
    assert [each.weights for each in decided] == [each.weights for each in ours]
    assert [(each.best, each.is_lost, each.rule) for each in decided] == [
        (each.best, each.is_lost, each.rule) for each in ours
    ]
    assert decided[0].confidence == pytest.approx(ours[0].confidence)
    assert "zero" not in {name for each in decided for name, _ in each.scores}


def test_routers_that_need_the_base_are_refused(library: Library, tiny_tokenizer: Any) -> None:
    decider = TextDecider(library, tiny_tokenizer)
    assert decider.experts == ("a", "b", "c", "zero")
    decider.check(Routing.of("retrieval", features="text"))
    decider.check(Routing.of(experts=["a"]))
    for setting in (Routing.of("retrieval"), Routing.of("arrow"), Routing.of("contrast")):
        with pytest.raises(RouterError, match="by the text alone"):
            decider.check(setting)
    with pytest.raises(RouterError, match="must be prepared"):
        decider.check(Routing.of("task-predictor", features="text"))
    with pytest.raises(UsageError, match="answers nothing"):
        decider.submit(Job((1,), Routing.of("base"), 1))


def test_what_other_commands_change_is_decided_with(
    library: Library, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "LOOK_S", 0.01)
    decider = TextDecider(library, tiny_tokenizer)

    async def work() -> None:
        await decider.start()
        Library.open(library.path).remove("b")
        async with asyncio.timeout(20):
            while "b" in decider.experts:
                await asyncio.sleep(0.005)
        (decision,) = await decider.decide(Routing.of("retrieval", top_k=1, features="text"), [(5, 6)])
        assert {name for name, _ in decision.scores} == {"a", "c"}
        await decider.unseat("c")  # before it leaves the library
        assert decider.experts == ("a", "zero")
        await decider.stop(drain=0)

    asyncio.run(work())
