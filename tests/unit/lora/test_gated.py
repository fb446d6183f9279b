"""The gated LoRA: how much memory a routed pass takes, and what a layer without experts at work costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorary.lora.gate import LayerInput
from lorary.lora.gated import GatedLora
from lorary.model.attach import routing
from lorary.ops.choose import Chosen

Make = Callable[..., Any]


class LargestTensor(TorchDispatchMode):
    """Keeps the largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


def test_nothing_of_tokens_by_experts_by_features_ever_exists(
    tiny_model: Make, random_adapter: Make, route: Make, generator: torch.Generator
) -> None:
    num_experts, rank, num_tokens = 64, 2, 40
    model = tiny_model()
    route(model, [random_adapter(model, f"e{i:02}", generator, rank=rank) for i in range(num_experts)])
    ids = torch.randint(1, 300, (1, num_tokens), generator=generator)
    # The low-rank buffer and the projections on the prototypes; the logits of the tiny model are larger.
    allowed = num_tokens * max(num_experts * (rank + 1), 300)
    assert allowed < num_tokens * num_experts * 32 / 2
    for setting in ("arrow", "uniform", {"router": "arrow", "mix": "factors"}):
        with routing(model, setting), LargestTensor() as largest, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        assert 0 < largest.num_elements <= allowed, setting


def gated(generator: torch.Generator, num_experts: int = 3, rank: int = 2) -> GatedLora:
    down = torch.randn(num_experts * (rank + 1), 6, generator=generator)
    up = torch.randn(num_experts * rank, 5, generator=generator)
    return GatedLora(down, up, torch.arange(num_experts).repeat_interleave(rank))


def test_a_layer_whose_experts_have_no_weight_returns_the_very_output(generator: torch.Generator) -> None:
    lora, x, output = gated(generator), torch.ones(2, 6), torch.ones(2, 5)
    assert lora(x, output) is output
    lora.fix(torch.zeros(3), "outputs")
    assert lora(x, output) is output


def test_a_single_position_and_any_leading_axes_give_the_same(generator: torch.Generator) -> None:
    lora, x, output = gated(generator), torch.randn(2, 3, 6, generator=generator), torch.zeros(2, 3, 5)
    lora.fix(torch.tensor([0.2, 0.0, 0.8]), "outputs")
    together = lora(x, output)
    assert torch.allclose(lora(x.flatten(0, 1), output.flatten(0, 1)), together.flatten(0, 1), atol=1e-6)
    assert torch.allclose(lora(x[1, 2], output[1, 2]), together[1, 2], atol=1e-6)


def test_experts_are_not_part_of_the_state_dict(generator: torch.Generator) -> None:
    assert list(gated(generator).state_dict()) == []
    assert list(gated(generator).parameters()) == []


def test_autocast_does_not_reach_the_scores(generator: torch.Generator) -> None:
    lora = gated(generator)
    seen: list[torch.dtype] = []

    class Even:
        reads_prototypes = True
        reads_z = False
        most = 3
        quick = decided = None

        def __call__(self, given: LayerInput) -> Chosen:
            assert given.projections is not None
            seen.append(given.projections.dtype)
            ones = torch.ones_like(given.projections)
            return Chosen(torch.arange(3).expand(len(ones), -1), ones)

    lora.route_by(Even(), "outputs")
    x, output = torch.randn(2, 3, 6, generator=generator), torch.zeros(2, 3, 5)
    plain = lora(x, output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lora(x, output), plain)
    assert seen == [torch.float32, torch.float32]
