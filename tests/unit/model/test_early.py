"""Prompts are read behind the first layers of a decoder, and the pass stops there."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.families import tiny_family
from torch import Tensor, nn

from lorary.errors import BaseModelError
from lorary.model.early import early_block, early_pass
from lorary.model.features import decoder_of, hidden_embedding, last_vectors, prompt_vectors

Make = Callable[..., Any]
IDS = torch.tensor([[5, 9, 2, 7], [11, 3, 4, 1]])


@pytest.fixture
def model(tiny_model: Make) -> Any:
    return tiny_model(dtype=torch.float64, num_hidden_layers=11)


def runs_of(model: Any) -> list[int]:
    """How often each layer runs, counted as it does."""
    runs = [0] * len(model.model.layers)
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _layer, _args, number=number: runs.__setitem__(number, runs[number] + 1))
    return runs


def looked(seen: list[Tensor], *, is_enough: bool) -> Callable[[Tensor], bool]:
    def look(hidden: Tensor) -> bool:
        seen.append(hidden)
        return is_enough

    return look


@torch.no_grad()
def test_a_pass_stops_behind_a_fifth_of_the_layers_and_leaves_no_hook(model: Any) -> None:
    states = model.model(input_ids=IDS, output_hidden_states=True).hidden_states
    hooks = [len(layer._forward_hooks) for layer in model.model.layers]
    runs, seen = runs_of(model), list[Tensor]()
    assert early_pass(model.model, {"input_ids": IDS}, looked(seen, is_enough=True)) is None
    assert runs == [1, 1, 1] + [0] * 8
    (hidden,) = seen
    assert torch.equal(hidden, states[3])
    assert [len(layer._forward_hooks) for layer in model.model.layers] == hooks
    expected = torch.stack([row.mean(dim=0) for row in states[3]])
    assert torch.allclose(prompt_vectors(model, hidden_embedding, IDS.tolist()), expected, rtol=1e-12)


@torch.no_grad()
def test_a_pass_goes_on_where_that_is_not_enough(model: Any) -> None:
    last, seen = model.model(input_ids=IDS).last_hidden_state, list[Tensor]()
    assert torch.equal(early_pass(model.model, {"input_ids": IDS}, looked(seen, is_enough=False)), last)
    assert len(seen) == 1
    assert torch.allclose(last_vectors(model, IDS.tolist()), last.mean(dim=1), rtol=1e-12)


@torch.no_grad()
def test_another_thread_s_pass_through_the_same_layers_goes_on(model: Any) -> None:
    expected, others = model.model(input_ids=IDS).last_hidden_state, list[Tensor]()

    def look(_hidden: Tensor) -> bool:
        assert threading.current_thread() is threading.main_thread()

        def run() -> None:
            with torch.no_grad():
                others.append(model.model(input_ids=IDS).last_hidden_state)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return True

    assert early_pass(model.model, {"input_ids": IDS}, look) is None
    assert torch.equal(others[0], expected)


@torch.no_grad()
def test_a_layer_whose_hooks_do_not_run_is_refused(model: Any) -> None:
    block = early_block(model.model)
    assert block is model.model.layers[2]
    model.model.layers[2].__class__ = type("Compiled", (type(block),), {"__call__": type(block).forward})
    with pytest.raises(BaseModelError, match="as a module with its hooks\nfound: Compiled ran 0 times"):
        early_pass(model.model, {"input_ids": IDS}, looked([], is_enough=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gpt_neox", "mamba", "falcon", "phi3", "gemma3_text"])
def test_the_layers_of_families_are_found_by_whatever_name(family: str) -> None:
    model = tiny_family(family)
    assert early_block(decoder_of(model)) is not None
    seen = list[Tensor]()
    assert early_pass(decoder_of(model), {"input_ids": IDS, "use_cache": False}, looked(seen, is_enough=True)) is None
    assert seen[0].shape[:2] == IDS.shape


@torch.no_grad()
@pytest.mark.parametrize("family", ["openai-gpt", "hy_v4", "prophetnet"])
def test_layers_that_give_no_state_for_each_token_are_passed_over(family: str) -> None:
    """Several streams, several n-grams; the first family's layers give lists."""
    model, seen = tiny_family(family), list[Tensor]()
    last = early_pass(decoder_of(model), {"input_ids": IDS, "use_cache": False}, looked(seen, is_enough=True))
    assert [hidden.shape[:2] for hidden in seen] == [IDS.shape]
    assert (last is None) == (family == "openai-gpt")


@torch.no_grad()
def test_without_layers_that_can_be_told_the_last_hidden_states_are_read() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            return (input_ids[..., None].double(),)

    seen = list[Tensor]()
    last = early_pass(Plain(), {"input_ids": IDS}, looked(seen, is_enough=True))
    assert last is not None
    assert torch.equal(seen[0], last)
