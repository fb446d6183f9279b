"""Changing what all threads share: one at a time, and while no other thread computes with the model."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorary.errors import UsageError
from lorary.model.features import decoder_of

# Held while settings are made ready, and while experts come and go; by threads and not by passes.
CHANGING = threading.RLock()


@contextmanager
def changing(model: Any) -> Iterator[None]:
    """Keep other threads out of a model while its experts change.

    A pass that begins in another thread waits until the change is done.

    Args:
        model: a routed model.

    Raises:
        UsageError: if another thread is inside a pass or a generation.
    """
    with CHANGING:
        handles = [module.register_forward_pre_hook(_wait) for module in {model, decoder_of(model)}]
        try:
            # From here on passes wait, so that those found now are all there are.
            if (name := _thread_inside(model)) is not None:
                raise UsageError(
                    "experts can come and go only while no other thread computes with the model",
                    found=f"thread '{name}' inside of {type(model).__name__}",
                    remedy="let its pass or generation end before",
                )
            yield
        finally:
            for handle in handles:
                handle.remove()


def _wait(*_pass: object) -> None:
    with CHANGING:
        pass


def _thread_inside(model: Any) -> str | None:
    """The name of another thread that runs a method of the model or of a part of it.

    Read off the threads' stacks, so that a pass costs nothing for it.
    """
    parts = {id(module) for module in model.modules()}
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in sys._current_frames().items():
        frame = None if ident == threading.get_ident() else top
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",) and id(frame.f_locals.get("self")) in parts:
                return names.get(ident, str(ident))
            frame = frame.f_back
    return None
