"""How many requests are under way, and when there will be room again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from lorary.serve.api_error import ApiError

# How much of an older mean time a request leaves.
_KEPT = 0.9
_LONGEST_WAIT = 60


class Traffic:
    """Counts requests under way.

    Args:
        most: that may be at the same time.
    """

    def __init__(self, most: int) -> None:
        self._most, self._number, self._seconds = most, 0, 1.0
        self.is_draining = False

    @property
    def number(self) -> int:
        """Requests under way."""
        return self._number

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one request.

        Raises:
            ApiError: if there is none, or the server is about to end.
        """
        self.check_open()
        if self._number >= self._most:
            raise self.busy(f"{self._most} requests are under way")
        self._number += 1
        start = perf_counter()
        try:
            yield
        finally:
            self._number -= 1
            self._seconds = _KEPT * self._seconds + (1 - _KEPT) * (perf_counter() - start)

    def check_open(self) -> None:
        """Refuse a request where the server is about to end.

        Raises:
            ApiError: if it is.
        """
        if self.is_draining:
            raise ApiError(
                503, "the server is about to end, and takes no more requests", code="draining", headers=_after(1)
            )

    def busy(self, found: str) -> ApiError:
        """The refusal of a request that there is no room for; it says when to ask again."""
        seconds = min(_LONGEST_WAIT, max(1, math.ceil(self._seconds)))
        rule, remedy = "there must be room for a request", f"ask again in {seconds} s"
        return ApiError(429, rule, found=found, remedy=remedy, code="busy", headers=_after(seconds))


def _after(seconds: int) -> dict[str, str]:
    return {"retry-after": str(seconds)}
