"""How much the engine does at once."""

from dataclasses import dataclass

from lorary.numbers import check_count


@dataclass(frozen=True)
class Sizes:
    """How much the engine does at once.

    Args:
        rows: most requests that are answered at a time; those behind them wait.
        capacity: most requests that are accepted, those that wait counted.
        chunk: tokens of prompts that are read in one pass, padding counted; the answers of the other requests stand
            still meanwhile.
        tokens: most tokens of keys and values. All rows take as much as the longest one, its answer counted.
        prefix_tokens: most tokens of prompts whose keys and values are kept for prompts that begin alike.

    Raises:
        UsageError: if a number is no whole number of at least 1 (`prefix_tokens`: at least 0).
    """

    rows: int = 16
    capacity: int = 128
    chunk: int = 256
    tokens: int = 65_536
    prefix_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("rows", "capacity", "chunk", "tokens"):
            check_count(name, getattr(self, name))
        check_count("prefix_tokens", self.prefix_tokens, least=0)
