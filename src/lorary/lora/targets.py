"""Which linear layers to adapt."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from lorary.axes import layer_number
from lorary.errors import UsageError
from lorary.lora.seat import linear_shape

ALL_LINEAR = "all-linear"


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    layers: Sequence[int] | None = None,
    silent: Collection[str] = (),
) -> dict[str, tuple[int, int]]:
    """Paths and shapes of the linear layers that a choice of targets means, in the model's order.

    Of a multimodal model those of its language model alone: no text reaches the others.

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
    shapes: dict[str, tuple[int, int]] = {}
    for path, module, shape in _linear_layers(model):
        if module is head:
            continue
        is_named = list(target_modules) != [ALL_LINEAR]
        if (path in silent) if not is_named else path.rsplit(".", 1)[-1] not in target_modules:
            continue
        number = layer_number(path)
        if layers is None or number in layers:
            shapes[path] = shape
    if quiet := [path for path in shapes if path in silent]:
        raise UsageError(
            f"the output of every target module must reach the logits of {type(model).__name__}",
            found=f"{quiet[0]}, which no pass calls as a module, or whose output is dropped",
            remedy=f"leave it out of the target modules, or use {ALL_LINEAR}",
        )
    _check_all_used(model, shapes, target_modules, layers, silent)
    return shapes


def num_layers(model: nn.Module) -> int:
    """Number of transformer layers of a model, counted from the paths of its linear layers."""
    numbers = (layer_number(path) for path, _, _ in _linear_layers(model))
    return max((number for number in numbers if number is not None), default=-1) + 1


def language_paths(model: nn.Module) -> tuple[str, ...]:
    """Where the language model of a multimodal model lies: its decoder and its output head; nothing for others.

    Args:
        model: of transformers, or any other module, which is no multimodal one.
    """
    multimodal: Any = model
    config: Any = getattr(multimodal, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        return ()
    if config.get_text_config(decoder=True) is config or not hasattr(multimodal, "get_decoder"):
        return ()
    decoder, head = multimodal.get_decoder(), multimodal.get_output_embeddings()
    if decoder is model:
        return ()
    return tuple(path for path, module in model.named_modules() if module is decoder or (module is head is not None))


def is_language(path: str, language: Sequence[str]) -> bool:
    """Whether a layer belongs to the language model.

    Args:
        path: of the layer.
        language: as `language_paths` gives it.
    """
    return not language or any(path == part or path.startswith(f"{part}.") for part in language)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    language = language_paths(model)
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape is not None and is_language(path, language):
            yield path, module, shape


def _check_all_used(
    model: nn.Module,
    shapes: dict[str, tuple[int, int]],
    target_modules: Sequence[str],
    layers: Sequence[int] | None,
    silent: Collection[str],
) -> None:
    names = {path.rsplit(".", 1)[-1] for path in shapes}
    unused = [] if list(target_modules) == [ALL_LINEAR] else [t for t in target_modules if t not in names]
    if unused or not shapes:
        linear = sorted({path.rsplit(".", 1)[-1] for path, _, _ in _linear_layers(model) if path not in silent})
        raise UsageError(
            f"every target module must name linear layers of {type(model).__name__}",
            found=unused or list(target_modules),
            remedy=f"it has {linear}, or use {ALL_LINEAR}",
        )
    missing = sorted(set(layers or ()) - {layer_number(path) for path in shapes})
    if missing:
        raise UsageError("layer numbers must exist in the base model", found=missing)


def place_of(path: str) -> tuple[str, str]:
    """The module kind and the depth that a dotted path names; the depth is `-` where the path has no number.

    >>> place_of("model.layers.12.self_attn.q_proj")
    ('self_attn.q_proj', '12')
    """
    parts = path.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[i + 1 :]), part
    return path, "-"
