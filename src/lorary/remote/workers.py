"""Many requests side by side: a remote answers each after a while, in which others can be on their way."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(action: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """The results of an action on each item, in their order; the first error ends it, and what has not begun is left.

    Args:
        action: is called in several threads.
        items: what it is done to.
    """
    with ThreadPoolExecutor(min(WORKERS, max(1, len(items)))) as pool:
        try:
            yield from pool.map(action, items)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
