"""The arithmetic floor of a training step: its bare matrix products, of the same shapes on the same weights.

Counted are the products that no implementation can leave out: every linear layer of the base forward, and backward to
its input where a gradient must pass; the two LoRA products of each adapted layer forward, and their four gradients
backward; the output head at the target positions. Attention, norms, activations and the optimiser are not counted.
Frozen weights are multiplied as training multiplies them: reordered for oneDNN where that is done.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorary.lora.seat import linear_shape
from lorary.train.onednn import multiply, packed_bytes, reordered


@dataclass(frozen=True)
class Product:
    """One linear layer as a step meets it: its weight (d_in, d_out), and what backward needs of it."""

    weight: Tensor
    passes_gradient: bool
    is_adapted: bool


def floor_seconds(
    model: Any,
    targets: Iterable[str],
    *,
    tokens: int,
    target_tokens: int,
    rank: int,
    num_units: int = 1,
    repeats: int = 3,
) -> float:
    """Seconds that the bare products of one micro-batch take, forward and backward: the median of some repeats.

    Args:
        model: the bare base model.
        targets: paths of the adapted layers.
        tokens: tokens computed in the micro-batch, padding counted.
        target_tokens: target tokens of it.
        rank: of every unit.
        num_units: units that share the micro-batch.
        repeats: passes over all products, after one that warms up.

    Returns:
        Seconds of one micro-batch, on the threads torch has.
    """
    run = products_of_step(model, targets, tokens, target_tokens, rank, num_units)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def products_of_step(
    model: Any, targets: Iterable[str], tokens: int, target_tokens: int, rank: int, num_units: int
) -> Callable[[], None]:
    """A function that computes the products of one micro-batch once; for callers that interleave it with other work."""
    base, head = find_products(model, set(targets))
    weights = [reordered(product.weight.mT) for product in base] if packed_bytes(model) else None
    like = {"dtype": model.dtype, "device": model.device}
    sizes = {size for product in (*base, head) for size in product.weight.shape}
    per_unit = max(1, tokens // num_units)
    x = {size: torch.randn(per_unit * num_units, size, **like) for size in sizes}
    at_targets = {size: torch.randn(target_tokens, size, **like) for size in head.weight.shape}
    lora_a = {size: torch.randn(num_units, rank, size, **like) for size in sizes}
    z = torch.randn(num_units, per_unit, rank, **like)

    def lora(forward: bool, d_in: int, d_out: int) -> None:
        inside, outside = (x[size].view(num_units, per_unit, size) for size in (d_in, d_out))
        if forward:
            torch.bmm(inside, lora_a[d_in].mT)
            torch.bmm(z, lora_a[d_out])
        else:
            torch.bmm(outside, lora_a[d_out].mT)
            torch.bmm(outside.mT, z)
            torch.bmm(z, lora_a[d_in])
            torch.bmm(z.mT, inside)

    @torch.no_grad()
    def run() -> None:
        for number, product in enumerate(base):
            inside = x[product.weight.shape[0]]
            multiply(inside, weights[number][0]) if weights else torch.mm(inside, product.weight)
            if product.is_adapted:
                lora(True, *product.weight.shape)
        torch.mm(at_targets[head.weight.shape[0]], head.weight)
        torch.mm(at_targets[head.weight.shape[1]], head.weight.mT)
        for number, product in reversed(list(enumerate(base))):
            if product.is_adapted:
                lora(False, *product.weight.shape)
            if product.passes_gradient:
                outside = x[product.weight.shape[1]]
                multiply(outside, weights[number][1]) if weights else torch.mm(outside, product.weight.mT)

    return run


def find_products(model: Any, targets: set[str]) -> tuple[list[Product], Product]:
    """The linear layers in the order a forward pass meets them, and the head; one short pass finds them."""
    head = model.get_output_embeddings()
    adapted = {model.get_submodule(path) for path in targets}
    met: list[Product] = []
    zero = torch.zeros((), dtype=model.dtype, device=model.device, requires_grad=True)

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        met.append(Product(_weight(module, model), args[0].requires_grad, module in adapted))
        return output + zero if module in adapted else output  # from here on, a gradient must pass

    layers = [m for m in model.modules() if linear_shape(m) is not None and m is not head]
    handles = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return met, Product(_weight(head, model), True, False)


def _weight(module: nn.Module, model: Any) -> Tensor:
    """(d_in, d_out): the layer's own weight, or one of its shape where that is quantised."""
    shape = linear_shape(module)
    assert shape is not None
    weight = module.get_parameter("weight").detach()
    if not weight.is_floating_point() or weight.numel() != shape[0] * shape[1]:
        return torch.randn(shape, dtype=model.dtype, device=model.device)
    return weight if isinstance(getattr(module, "nx", None), int) else weight.mT
