"""Something that is wrong with a library."""

from dataclasses import dataclass

from lorary.errors import LoraryError


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a library.

    Args:
        adapter: name of the adapter, or of the stray entry in the adapters folder; the path of anything else.
        rule: what must hold.
        found: what was found instead.
        remedy: what to do.
    """

    adapter: str
    rule: str
    found: str
    remedy: str

    @classmethod
    def of(cls, adapter: str, error: LoraryError) -> "Problem":
        """An error as a problem of an adapter."""
        return cls(adapter, error.rule, error.found or "", error.remedy or "")
