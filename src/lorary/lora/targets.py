"""Which linear layers to adapt."""

import re
from collections.abc import Collection, Sequence

from torch import nn

from lorary.errors import UsageError
from lorary.lora.seat import linear_shape

ALL_LINEAR = "all-linear"
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    layers: Sequence[int] | None = None,
    silent: Collection[str] = (),
) -> dict[str, tuple[int, int]]:
    """Paths and shapes of the linear layers that a choice of targets means, in the model's order.

    Args:
        model: the base model.
        target_modules: last parts of the paths (`q_proj`), as PEFT takes them; `all-linear` alone means every linear
            layer but the output head.
        layers: numbers of the transformer layers to adapt; all of them where None.
        silent: paths of linear layers whose output reaches no logits: no part of `all-linear`, refused by name.

    Returns:
        (d_in, d_out) by path.

    Raises:
        UsageError: if a target or a layer number matches nothing, or a target is a silent layer.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape is None or module is head:
            continue
        is_named = list(target_modules) != [ALL_LINEAR]
        if (path in silent) if not is_named else path.rsplit(".", 1)[-1] not in target_modules:
            continue
        number = layer_number(path)
        if layers is None or number in layers:
            found[path] = shape
    if quiet := [path for path in found if path in silent]:
        raise UsageError(
            f"the output of every target module must reach the logits of {type(model).__name__}",
            found=f"{quiet[0]}, which no pass calls as a module, or whose output is dropped",
            remedy=f"leave it out of the target modules, or use {ALL_LINEAR}",
        )
    _check_all_used(model, found, target_modules, layers, silent)
    return found


def layer_number(path: str) -> int | None:
    """Number of the transformer layer a path lies in: the first number in it."""
    match = _LAYER_NUMBER.search(path)
    return int(match.group(1)) if match else None


def num_layers(model: nn.Module) -> int:
    """Number of transformer layers of a model, counted from the paths of its linear layers."""
    numbers = (layer_number(path) for path, module in model.named_modules() if linear_shape(module))
    return max((number for number in numbers if number is not None), default=-1) + 1


def _check_all_used(
    model: nn.Module,
    found: dict[str, tuple[int, int]],
    target_modules: Sequence[str],
    layers: Sequence[int] | None,
    silent: Collection[str],
) -> None:
    names = {path.rsplit(".", 1)[-1] for path in found}
    unused = [] if list(target_modules) == [ALL_LINEAR] else [t for t in target_modules if t not in names]
    if unused or not found:
        linear = sorted({p.rsplit(".", 1)[-1] for p, m in model.named_modules() if linear_shape(m) and p not in silent})
        raise UsageError(
            f"every target module must name linear layers of {type(model).__name__}",
            found=unused or list(target_modules),
            remedy=f"it has {linear}, or use {ALL_LINEAR}",
        )
    missing = sorted(set(layers or ()) - {layer_number(path) for path in found})
    if missing:
        raise UsageError("layer numbers must exist in the base model", found=missing)
