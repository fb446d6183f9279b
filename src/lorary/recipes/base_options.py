"""Which base model a command loads, and how."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseOptions:
    """Which base model is loaded, and how.

    Args:
        base: base model: `embedded`, a transformers folder, a .gguf file or a Hub id; the library's own by default.
        force_base: accept unrelated weights of the same shapes.
        device: where it runs: `auto`, `cpu`, `cuda`, `mps`, ...
        dtype: its precision: `auto`, `float32`, `bfloat16`, ...
    """

    base: str | None = None
    force_base: bool = False
    device: str = "auto"
    dtype: str = "auto"
