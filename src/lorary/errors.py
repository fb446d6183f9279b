"""The exception tree. Each class inherits from `LoraryError` and from the standard-library type it refines.

    LoraryError
    ├── UsageError (ValueError)      the call itself is wrong: a bad option, a path that is not there     exit code 2
    ├── AdapterError (ValueError)    an adapter that cannot be read exactly, or does not fit
    ├── LibraryError (ValueError)    a library folder that is missing, damaged, locked or inconsistent
    │   └── NoSuchAdapterError (KeyError)   a name that no adapter of a library has
    ├── BaseModelError (ValueError)  a base model that cannot be found, is not the one asked for, or gives no numbers
    ├── TaskError (ValueError)       rows, files or data sets that do not follow the task format
    ├── RouterError (ValueError)     a router that does not exist, or cannot run over these experts
    ├── ShapeError (ValueError)      tensors whose axes disagree
    ├── TrainError (RuntimeError)    a build that cannot go on (a loss that is not finite, a run in use)
    ├── BusyError (RuntimeError)     a server that has as many requests as it holds
    ├── EngineError (RuntimeError)   a server whose engine stops, or has failed
    ├── RequestTimeoutError (TimeoutError)   a request whose time is up
    └── MissingExtraError (ImportError)   an optional dependency that is not installed

Every error says the rule, the value found and the remedy, and names the file, adapter and layer where there is one.
"""

# Characters of each part of a message: what is found may be anybody's, and of any length.
MOST_CHARACTERS = 1000


class LoraryError(Exception):
    """Base of all errors that Lorary raises on purpose.

    Args:
        rule: what must hold, as a sentence without a full stop; names the file, adapter and layer.
        found: the offending value.
        remedy: what to do about it.
    """

    exit_code = 1

    def __init__(self, rule: str, *, found: object = None, remedy: str | None = None) -> None:
        self.rule = _shortened(rule)
        self.found = None if found is None else _shortened(str(found))
        self.remedy = None if remedy is None else _shortened(remedy)
        lines = [self.rule]
        if self.found is not None:
            lines.append(f"found: {self.found}")
        if self.remedy is not None:
            lines.append(f"remedy: {self.remedy}")
        super().__init__("\n".join(lines))


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


class UsageError(LoraryError, ValueError):
    """The call itself is wrong: an option out of range, a path that does not exist."""

    exit_code = 2


class AdapterError(LoraryError, ValueError):
    """An adapter that cannot be read exactly, or does not fit where it is asked to go."""


class LibraryError(LoraryError, ValueError):
    """A library folder that is missing, damaged, locked or inconsistent."""


class NoSuchAdapterError(LibraryError, KeyError):
    """A name that no adapter of a library has."""

    __str__ = LibraryError.__str__  # a KeyError would show its message as a literal


class BaseModelError(LoraryError, ValueError):
    """A base model that cannot be found or loaded, is not the one that was recorded, or gives no numbers."""


class TaskError(LoraryError, ValueError):
    """Rows, files or data sets that do not follow the task format."""


class RouterError(LoraryError, ValueError):
    """A router that does not exist, or cannot run over these experts."""


class ShapeError(LoraryError, ValueError):
    """Tensors whose axes disagree."""


class TrainError(LoraryError, RuntimeError):
    """A build that cannot go on."""


class MissingExtraError(LoraryError, ImportError):
    """An optional dependency that is not installed.

    Args:
        package: the package that failed to import.
        extra: the extra of Lorary that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package '{package}', which is not installed",
            remedy=f"pip install 'lorary[{extra}]'",
        )


def did_you_mean(name: str, names: object, *, remedy: str | None = None) -> str | None:
    """A remedy that names what was likely meant by a name that does not exist.

    Args:
        name: as it was given.
        names: those that exist, as any iterable.
        remedy: what to say where nothing is like it, and after the guess.

    >>> did_you_mean("arow", ["arrow", "base"])
    "did you mean 'arrow'?"
    """
    # Imported here: the command imports next to nothing before it can answer an interruption.
    from difflib import get_close_matches

    near = get_close_matches(name, list(names), n=1)  # type: ignore[call-overload]
    parts = [f"did you mean '{near[0]}'?"] if near else []
    return " ".join([*parts, *([remedy] if remedy else [])]) or None


class BusyError(LoraryError, RuntimeError):
    """A server has as many requests as it holds; the same request may succeed later."""


class EngineError(LoraryError, RuntimeError):
    """A server's engine takes no requests any more: it stops, or has failed."""


class RequestTimeoutError(LoraryError, TimeoutError):
    """A request's time is up before its answer is complete."""
