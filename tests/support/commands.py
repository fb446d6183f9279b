"""What running a command leaves, for all tests of commands; the fixture `run` is in `e2e/conftest.py`."""

from collections.abc import Callable
from typing import NamedTuple


class Outcome(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]
