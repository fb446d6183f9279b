"""Where the layers of an adapter lie in the base: under their own paths, under newer ones, or outside its language."""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, TypeVar

from lorary.adapter import Adapter
from lorary.errors import AdapterError
from lorary.formats.peft_patterns import new_adapter
from lorary.library.fingerprint import Fingerprint
from lorary.lora.targets import is_language

Value = TypeVar("Value")


def place(paths: Iterable[str], base: Fingerprint) -> dict[str, str | None]:
    """The layer of the base that each path of an adapter means.

    An adapter that was saved when its base's family had other paths names its layers by these. transformers knows how
    to map them, and PEFT maps an adapter's as it does.

    Args:
        paths: of the adapter's layers.
        base: of the base model.

    Returns:
        By path: the path of the layer in the base, itself where neither has one; None for a layer of a multimodal
        model that is no part of its language model, which no text reaches.
    """
    placed: dict[str, str | None] = {}
    for path in paths:
        base_path = path if base.layers.shape(path) is not None else _newer(path, base.architecture)
        if base.layers.shape(base_path) is None:
            placed[path] = path
        else:
            placed[path] = base_path if is_language(base_path, base.language) else None
    return placed


def placed_adapter(adapter: Adapter, base: Fingerprint) -> Adapter:
    """An adapter under the paths of the base, without what lies outside its language model.

    Args:
        adapter: as read.
        base: of the base model.

    Returns:
        The adapter itself where nothing changes; else one whose configuration names the layers one by one.

    Raises:
        AdapterError: if two of its layers are one of the base, or none is left.
    """
    modules = placed_layers(adapter.name, adapter.modules, base)
    if list(modules) == list(adapter.modules):
        return adapter
    named = adapter.config.get("base_model_name_or_path")
    return new_adapter(adapter.name, modules, None if named is None else str(named))


def placed_layers(name: str, layers: Mapping[str, Value], base: Fingerprint) -> dict[str, Value]:
    """What belongs to layers of an adapter, by their paths in the base; see `placed_adapter`.

    Args:
        name: of the adapter, for errors.
        layers: by path.
        base: of the base model.

    Raises:
        AdapterError: as there.
    """
    placed: dict[str, Value] = {}
    for path, base_path in place(layers, base).items():
        if base_path in placed:
            raise AdapterError(
                f"adapter '{name}' must have one pair of factors for a layer",
                found=f"{path} and another path that mean {base_path}",
                remedy="take one of them out of its weights",
            )
        if base_path is not None:
            placed[base_path] = layers[path]
    if layers and not placed:
        raise AdapterError(
            f"adapter '{name}' must adapt the base's language model, {' and '.join(base.language)}",
            found=f"{len(layers)} layers outside of it, the first {next(iter(layers))}",
            remedy="Lorary routes text: use it with PEFT",
        )
    return placed


@cache
def _renamings(architecture: str) -> tuple[Any, ...]:
    """What transformers renames in older checkpoints of a model class, step by step."""
    import transformers  # takes seconds, and few adapters come here
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    kind = getattr(transformers, architecture, None)
    family = getattr(getattr(kind, "config_class", None), "model_type", None)
    conversions = get_checkpoint_conversion_mapping(architecture) or get_checkpoint_conversion_mapping(family) or ()
    steps = (*conversions, *(get_checkpoint_conversion_mapping("legacy") or ()))
    return tuple(step for step in steps if type(step) is WeightRenaming)


def _newer(path: str, architecture: str) -> str:
    key = f"{path}.weight"
    for step in _renamings(architecture):
        key = step.rename_source_key(key)[0]
    return key.removesuffix(".weight")
