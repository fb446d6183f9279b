"""Lorary: a library of LoRA experts over one frozen base model, routed token by token as one model.

The names below are loaded when they are first used, so that `import lorary` (and `lorary --help`) imports no torch.
"""

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
    from lorary.adapter import Adapter, LoraFactors
    from lorary.library.store import Library
    from lorary.model.attach import attach, detach, routing
    from lorary.model.base import load_base
    from lorary.model.live import add_expert, remove_expert, replace_expert
    from lorary.model.save import load, save
    from lorary.model.trace import trace
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
    "detach",
    "load",
    "load_base",
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
    "which": "lorary.recipes.which",
}


# Hidden from type checkers, which would take it to mean that any name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load a public name on first use (PEP 562), and keep it so that the next use costs nothing.

        Raises:
            AttributeError: if Lorary has no such public name.
        """
        if name not in _SOURCES:
            raise AttributeError(f"module 'lorary' has no attribute '{name}'")
        # Imported here, since the command cannot answer an interruption before it has imported this file.
        from importlib import import_module

        value = getattr(import_module(_SOURCES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
