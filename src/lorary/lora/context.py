"""What belongs to the thread or asyncio task that runs: the `with` blocks it stands in, and objects of its own.

Two threads may use one model at once. Each follows the blocks that it entered; one that entered none has the model's
own setting. A new thread stands in no block, as it does in none of torch's `autocast` and `no_grad`; an asyncio task,
and what `contextvars.copy_context().run` calls, stand in those of the code that made them (docs/adr/0012).
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context, ContextVar
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch

from lorary.errors import UsageError

T = TypeVar("T")

_NUMBERS = count(1)
_OPEN: set[int] = set()
_ENTERED: ContextVar[tuple[int, ...]] = ContextVar("lorary_entered", default=())
_THREAD: ContextVar[int] = ContextVar("lorary_thread", default=0)


def new_block() -> int:
    """The number of a block that is about to be entered; none is used twice."""
    return next(_NUMBERS)


@contextmanager
def inside(block: int) -> Iterator[None]:
    """Stand in a block; it may be left in another thread, and in another order than others were entered."""
    _OPEN.add(block)
    _ENTERED.set((*(other for other in _ENTERED.get() if other in _OPEN), block))
    try:
        yield
    finally:
        _OPEN.discard(block)
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other in _OPEN))


def is_inside(block: int) -> bool:
    """Whether the code that runs stands in a block."""
    return block in _entered()


def innermost(held: Mapping[int, T], default: T) -> T:
    """What is held for the innermost block that the code that runs stands in.

    Args:
        held: by block.
        default: for code that stands in none of these.
    """
    if not held:  # compiled code knows no context
        return default
    for block in reversed(_ENTERED.get() or _entered()):
        value = held.get(block)
        if value is not None:
            return value
    return default


def _entered() -> tuple[int, ...]:
    entered = _ENTERED.get()
    if not entered and (caller := _caller()) is not None:
        return caller.get(_ENTERED, ())
    return entered


def _caller() -> Context | None:
    """Where a backward pass was called from: on a GPU, layers that it computes anew run in a thread of autograd's own.

    PyTorch hands the context of the call to these threads. None outside of a backward pass, and where it does not.
    """
    if not is_backward() or not torch._C._is_key_in_tls("context"):
        return None
    caller: Any = torch._C._get_obj_in_tls("context")
    return caller if isinstance(caller, Context) else None


def is_backward() -> bool:
    """Whether the running thread is in a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Local(threading.local, Generic[T]):
    """One value that each thread has for itself.

    Args:
        make: gives the value of a thread that asks for the first time.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.value = make()


class PerThread(Generic[T]):
    """One object for each thread, so that no pass reads what another one decides; a copy begins anew.

    Args:
        make: makes one.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self._made: WeakValueDictionary[int, T] = WeakValueDictionary()
        self._local: Local[T | None] = Local(self._first)

    @property
    def here(self) -> T:
        """That of the running thread; of the thread that called it, where a backward pass computes layers anew.

        Raises:
            UsageError: if a backward pass runs in another thread than the pass it belongs to.
        """
        value = self._local.value
        return self._missing() if value is None else value

    def _first(self) -> T | None:
        if is_backward():
            return None
        made = self._made[threading.get_ident()] = self.make()
        return made

    def _missing(self) -> T:
        """For a thread that first asked in a backward pass."""
        if (made := self._first()) is not None:
            self._local.value = made
            return made
        caller = _caller()
        made = None if caller is None else self._made.get(caller.get(_THREAD, 0))
        if made is None:
            raise UsageError(
                "a backward pass that computes layers anew must run in the thread of its forward pass",
                found="another thread, which knows none of that pass's decisions",
                remedy="route every layer for itself (per='layer'), or leave gradient checkpointing out",
            )
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def note_thread() -> None:
    """Let threads of autograd's own find what belongs to the running thread, which begins a pass."""
    if torch.compiler.is_compiling():  # it computes nothing anew, and knows no context
        return
    _THREAD.set(threading.get_ident())
