"""Adapters as folders of PEFT's two files."""

from pathlib import Path

from lorary.adapter import Adapter
from lorary.formats.peft import encode_adapter


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the files of an adapter into a folder, made where it does not exist."""
    files = encode_adapter(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
