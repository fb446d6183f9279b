"""One expert in a bare base model, every layer gated by what the caller gives: for looking at it, and for training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lorary.adapter import Adapter
from lorary.lora.gated import GatedLora
from lorary.lora.seat import seat, unseat
from lorary.model.layers import build_layers


@contextmanager
def alone(model: Any, adapter: Adapter) -> Iterator[Mapping[str, GatedLora]]:
    """Seat one adapter while the context lasts; it acts where its layers are given a gate.

    Args:
        model: the bare base model, changed in place.
        adapter: that fits it.

    Yields:
        The adapter's layers by path, in the model's order.

    Raises:
        AdapterError: if it does not fit, or experts are seated in the model.
    """
    loras = {path: layer.lora for path, layer in build_layers(model, [adapter]).items()}
    handles = seat(model, loras)
    try:
        yield loras
    finally:
        unseat(model, list(loras), handles)
