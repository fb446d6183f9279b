"""Lorary: a library of LoRA experts over one frozen base model, routed token by token as one model.

The names below are loaded when they are first used, so that `import lorary` (and `lorary --help`) imports no torch.
"""

import sys

from lorary import fetching
from lorary.errors import (
    AdapterError,
    BaseModelError,
    LibraryError,
    LoraryError,
    MissingExtraError,
    RouterError,
    ShapeError,
    TaskError,
    TrainError,
    UsageError,
)
from lorary.version import __version__

# As `typing` has it, which takes most of the time of this import; type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from lorary.adapter import Adapter, LoraFactors
    from lorary.library.store import Library
    from lorary.model.attach import attach, detach, routing
    from lorary.model.base import load_base
    from lorary.model.live import add_expert, remove_expert, replace_expert
    from lorary.model.save import load, save
    from lorary.model.trace import trace
    from lorary.recipes.cluster import cluster
    from lorary.recipes.evaluate import evaluate
    from lorary.recipes.explain import explain
    from lorary.recipes.merge import merge
    from lorary.recipes.which import which

__all__ = [
    "Adapter",
    "AdapterError",
    "BaseModelError",
    "Library",
    "LibraryError",
    "LoraFactors",
    "LoraryError",
    "MissingExtraError",
    "RouterError",
    "ShapeError",
    "TaskError",
    "TrainError",
    "UsageError",
    "__version__",
    "add_expert",
    "attach",
    "cluster",
    "detach",
    "evaluate",
    "explain",
    "load",
    "load_base",
    "merge",
    "remove_expert",
    "replace_expert",
    "routing",
    "save",
    "trace",
    "which",
]

# Where each lazy name lives.
_SOURCES = {
    "Adapter": "lorary.adapter",
    "LoraFactors": "lorary.adapter",
    "Library": "lorary.library.store",
    "attach": "lorary.model.attach",
    "detach": "lorary.model.attach",
    "routing": "lorary.model.attach",
    "load_base": "lorary.model.base",
    "add_expert": "lorary.model.live",
    "remove_expert": "lorary.model.live",
    "replace_expert": "lorary.model.live",
    "load": "lorary.model.save",
    "save": "lorary.model.save",
    "trace": "lorary.model.trace",
    "cluster": "lorary.recipes.cluster",
    "evaluate": "lorary.recipes.evaluate",
    "explain": "lorary.recipes.explain",
    "merge": "lorary.recipes.merge",
    "which": "lorary.recipes.which",
}
# Public functions that have the names of rooms: the room itself is what is called, `lorary.evaluate(...)`. Python binds
# a room to its name whenever anything is imported from it, and a function of that name would be gone.
_CALLED_ROOMS = ("cluster", "evaluate", "merge")


def _fetched(url: str) -> "Path":
    """The folder of a copy of a remote library; for the room of libraries, which stands below that of remotes."""
    from lorary.remote.clone import cached_copy

    return cached_copy(url)


def _of_snapshots(name: str) -> "Callable[..., Any]":
    """A function that keeps states of a library; for the room of libraries, too."""
    from importlib import import_module

    function: Callable[..., Any] = getattr(import_module("lorary.remote.snapshots"), name)
    return function


fetching.fetched, fetching.of_snapshots = _fetched, _of_snapshots

# Hidden from type checkers, which would take it to mean that any name exists.
if not TYPE_CHECKING:

    def _load(name):
        """The value of a lazy public name."""
        # Imported here, since the command cannot answer an interruption before it has imported this file.
        from importlib import import_module

        return getattr(import_module(_SOURCES[name]), name)

    class _CalledRoom(type(sys)):
        """A room that can be called as the public function of its name, and is documented as that."""

        def __call__(self, *arguments, **keywords):
            return self._function(*arguments, **keywords)

        @property
        def _function(self):
            return _load(self.__name__.rpartition(".")[2])

        @property
        def __signature__(self):
            from inspect import signature

            return signature(self._function)

        @property
        def __doc__(self):
            return self._function.__doc__

    class _Package(type(sys)):
        """Lorary itself: sees to it that rooms can be called."""

        def __setattr__(self, name, value):
            if name in _CALLED_ROOMS and type(value) is type(sys):
                value.__class__ = _CalledRoom
            super().__setattr__(name, value)

    sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str) -> object:
        """Load a public name on first use (PEP 562), and keep it so that the next use costs nothing.

        Raises:
            AttributeError: if Lorary has no such public name.
        """
        if name not in _SOURCES:
            raise AttributeError(f"module 'lorary' has no attribute '{name}'")
        if name in _CALLED_ROOMS:
            from importlib import import_module

            value = import_module(f"lorary.{name}")
        else:
            value = _load(name)
        setattr(sys.modules[__name__], name, value)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
