"""The library: a folder of adapters over one base model."""

from lorary.library.store import Library

__all__ = ["Library"]
