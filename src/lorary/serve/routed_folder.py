"""A routed adapter on disk: a PEFT folder with its layout beside it, checked before it is served."""

from pathlib import Path

from lorary.adapter import content_hash
from lorary.errors import AdapterError
from lorary.formats.peft import read_adapter
from lorary.serve.routed_layout import ROUTING_FILE, RoutedLayout, read_layout


def read_routed_folder(folder: str | Path) -> RoutedLayout | None:
    """The layout of the adapter in a folder, checked against its weights; None for an ordinary adapter.

    Raises:
        AdapterError: if the file is damaged, or belongs to other weights.
    """
    layout = read_layout(folder)
    if layout is None:
        return None
    adapter = read_adapter(folder)
    if content_hash(adapter.config, adapter.tensors) != layout.content_hash:
        raise AdapterError(
            f"{Path(folder) / ROUTING_FILE} must belong to the adapter beside it",
            found="weights of another hash",
            remedy="export the library again",
        )
    return layout
