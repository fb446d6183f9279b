"""A rule with data is one function in `route/`, one in `prepare/` and a line in each of the two catalogues."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.data.schema import Task
from lorary.data.template import Example
from lorary.errors import RouterError
from lorary.library.store import Library
from lorary.model.attach import attach, detach, routing
from lorary.model.base import Base
from lorary.model.trace import trace
from lorary.prepare.catalogue import MEASURES
from lorary.prepare.expert_rows import rows_of_experts
from lorary.prepare.measure import Measure, MeasureContext, Tensors
from lorary.prepare.prepare_library import PrepareResult, prepare_library
from lorary.prepare.settings import PrepareSettings
from lorary.route import ROUTERS
from lorary.route.rule import Data, Reading, Rule
from lorary.route.spec import parse_spec

Make = Callable[..., Any]


# What would be src/lorary/route/toy.py
def toy_readout(reading: Reading) -> Tensor:
    assert reading.projections is not None
    return reading.projections.masked_fill(~reading.alive, -torch.inf)


# What would be src/lorary/prepare/toy.py
def expert_toy(
    context: MeasureContext, name: str, examples: Sequence[Example]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One row for each layer: the mean of the expert's lora_a, times the tokens of its longest prompt."""
    longest = max(len(example.prompt_ids) for example in examples)
    return {path: own.lora_a.mean(dim=0) * longest for path, own in context.library.get(name)}, {"longest": longest}


def pooled_toy(context: MeasureContext, examples: Mapping[str, Sequence[Example]]) -> Mapping[str, Tensors]:
    return {name: expert_toy(context, name, rows)[0] for name, rows in examples.items()}


def fitted_toy(samples: Mapping[str, Tensors]) -> Mapping[str, Tensors]:
    return samples


EACH, POOLED, FITTED = (
    Measure(per_expert=expert_toy),
    Measure(pooled=pooled_toy),
    Measure(per_expert=expert_toy, fit=fitted_toy),
)


@pytest.fixture
def experts(
    library: Library, base: Base, random_adapter: Make, generator: torch.Generator, tasks: dict[str, Task]
) -> Iterator[Library]:
    for name, task in (("one", "alpha"), ("two", "beta")):
        told = {"tasks": [task], "data_hashes": {task: tasks[task].data_hash}}
        library.add_adapter(random_adapter(base.model, name, generator, rank=2), told)
    yield library
    if hasattr(base.model, "_lorary"):
        detach(base.model)


def test_every_rule_with_data_says_how_it_is_measured() -> None:
    assert set(MEASURES) == {name for name, rule in ROUTERS.items() if rule.data is not None}
    for name, measure in MEASURES.items():
        data = ROUTERS[name].data
        assert data is not None
        assert data.is_joint == (measure.pooled is not None or measure.fit is not None), name
        assert (measure.per_expert is None) == (measure.pooled is not None), name


@pytest.mark.parametrize(("measure", "is_joint"), [(EACH, False), (POOLED, True), (FITTED, True)])
def test_a_toy_rule_is_prepared_attached_and_generates(
    base: Base, experts: Library, reference: str, monkeypatch: pytest.MonkeyPatch, measure: Measure, is_joint: bool
) -> None:
    rule = Rule(
        "a toy", data=Data("toy", is_joint=is_joint, num_rows=3), reads=frozenset({"score_rows"}), scores=toy_readout
    )
    monkeypatch.setitem(ROUTERS, "toy", rule)  # type: ignore[arg-type]
    monkeypatch.setitem(MEASURES, "toy", measure)  # type: ignore[arg-type]

    with pytest.raises(RouterError, match=r"'toy' must be prepared .*\nfound: .*'one'.*\n.*--router toy"):
        attach(base.model, experts, router="toy")
    settings = PrepareSettings("toy")

    def run() -> PrepareResult:
        data = rows_of_experts(experts, experts.names(), reference, {}, settings.num_rows, settings.seed)
        return prepare_library(base, experts, data, settings)

    assert (settings.num_rows, run().prepared, run().kept) == (3, ["one", "two"], ["one", "two"])
    model = attach(base.model, experts, router="toy", top_k=1)
    ids = torch.arange(1, 9)[None]
    with trace(model) as traced:
        answer = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, 10)
    weights = traced.stacked()
    assert torch.allclose(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    with routing(model, {"router": "toy", "per": "token"}):
        model(input_ids=ids)
    assert parse_spec("toy[top_k=1]").label == "toy[top_k=1]"
