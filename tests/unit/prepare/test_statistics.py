"""What is measured on an expert's own data, against merged weights and plain hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapter import Adapter
from lorary.data.template import Example
from lorary.errors import AdapterError, TaskError
from lorary.model.features import mean_hidden, prompt_vectors
from lorary.prepare.centroid import layer_centroids
from lorary.prepare.norm import norm_statistics

Make = Callable[..., Any]


@pytest.fixture
def model(tiny_model: Make) -> Any:
    return tiny_model(dtype=torch.float64)


@pytest.fixture
def adapter(model: Any, random_adapter: Make, generator: torch.Generator) -> Adapter:
    found: Adapter = random_adapter(model, "own", generator)
    return found


@torch.no_grad()
def inputs_of(model: Any, adapter: Adapter, examples: list[Example]) -> dict[str, list[Tensor]]:
    """(seq, d_in) inputs of each adapted layer, row by row, in a model whose weights hold the update."""
    seen: dict[str, list[Tensor]] = {path: [] for path in adapter.modules}
    before = {path: model.get_submodule(path).weight.clone() for path in adapter.modules}
    handles = []
    for path, factors in adapter:
        layer = model.get_submodule(path)
        layer.weight += factors.delta()
        handles.append(layer.register_forward_pre_hook(lambda _layer, args, path=path: seen[path].append(args[0][0])))
    for example in examples:
        model(input_ids=torch.tensor([[*example.prompt_ids, *example.target_ids][:-1]]))
    for handle in handles:
        handle.remove()
    for path, weight in before.items():
        model.get_submodule(path).weight.copy_(weight)
    return seen


def test_centroids_are_means_over_last_tokens_with_the_expert_in_place(
    model: Any, adapter: Adapter, random_examples: Make, generator: torch.Generator
) -> None:
    examples = random_examples(9, generator)
    found, seen = layer_centroids(model, adapter, examples), inputs_of(model, adapter, examples)
    assert set(found) == set(adapter.modules)
    for path, rows in seen.items():
        expected = torch.stack([row[-1] for row in rows]).mean(dim=0)
        assert torch.allclose(found[path], expected, rtol=1e-9, atol=1e-12)
    assert not any("lorary" in name for name, _ in model.named_modules())


def test_norms_are_measured_over_all_tokens_but_first_ones(
    model: Any, adapter: Adapter, random_examples: Make, generator: torch.Generator
) -> None:
    examples = random_examples(9, generator)
    found, seen = norm_statistics(model, adapter, examples), inputs_of(model, adapter, examples)
    for path, rows in seen.items():
        norms = torch.cat([row[1:] for row in rows]) @ adapter.modules[path].delta().mT
        deviation, mean = torch.std_mean(norms.norm(dim=1), correction=0)
        assert torch.allclose(found[path], torch.stack([mean, deviation]), rtol=1e-9)


def test_an_update_of_zero_has_statistics_and_too_little_data_is_refused(
    model: Any, random_adapter: Make, random_examples: Make, generator: torch.Generator
) -> None:
    zero = random_adapter(model, "zero", generator, size=0.0)
    examples = random_examples(3, generator)
    assert all(known.tolist() == [0.0, 1.0] for known in norm_statistics(model, zero, examples).values())
    own = random_adapter(model, "own", generator)
    with pytest.raises(TaskError, match=r"data of expert 'own' must have tokens of different norms at .*\nfound: 1 "):
        norm_statistics(model, own, [Example((5, 6), (7,), 0)])


def test_a_model_that_holds_experts_is_refused(
    model: Any, adapter: Adapter, route: Make, random_examples: Make, generator: torch.Generator
) -> None:
    route(model, [adapter])
    with pytest.raises(AdapterError, match="must be free"):
        layer_centroids(model, adapter, random_examples(2, generator))


@torch.no_grad()
def test_the_vector_of_a_prompt_is_its_mean_early_hidden_state_in_any_company(model: Any) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    found = prompt_vectors(model, lambda hidden, _ids, real: mean_hidden(hidden, real), prompts)
    for row, prompt in zip(found, prompts, strict=True):
        hidden = model.model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[1][0]
        assert torch.allclose(row, hidden.mean(dim=0), rtol=1e-10)
