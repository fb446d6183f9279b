"""What was put on a model and can be taken away."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Handle(Protocol):
    """Something that was put on a model and can be taken away."""

    def remove(self) -> None:
        """Take it away."""
