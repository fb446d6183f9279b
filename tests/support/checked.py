"""How annotations are checked while the tests run: by beartype, and by jaxtyping where a shape or a dtype stands.

jaxtyping's own decorator binds the arguments of every call and checks them twice, for its messages. That took half of
the time of all tests. Here a function whose annotations name no array is checked by beartype alone, and one that names
some is checked once, in a scope of its own for the sizes of its axes.
"""

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from types import CodeType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_scope = partial(jaxtyping.jaxtyped, "context")
_inner: set[CodeType] = set()


def checked(function: Any = None, *, typechecker: Any = None) -> Any:
    """Check the annotations of a function, or of the fields of a dataclass: what jaxtyping's import hook puts on each.

    Args:
        function: to check.
        typechecker: as the import hook names it; ours is known already.
    """
    if function is None:
        return partial(checked, typechecker=typechecker)
    if inspect.isclass(function):
        if is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__)
        return function
    if "<locals>" in function.__qualname__:
        # It is made anew by each call of the function around it, which takes a millisecond: the first one is checked.
        if function.__code__ in _inner:
            return function
        _inner.add(function.__code__)
    function.__annotations__ = {
        name: _resolved(annotation, function.__globals__) for name, annotation in function.__annotations__.items()
    }
    return _in_own_scope(function) if any(map(_names_an_array, function.__annotations__.values())) else _check(function)


def _in_own_scope(function: Callable[..., Any]) -> Callable[..., Any]:
    inner = _check(function)

    @wraps(function)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        with _scope():
            return inner(*args, **keywords)

    return wrapped


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation that is text names: anything, where that is not there when the function is made."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, names)
    except (NameError, AttributeError):
        return Any


def _names_an_array(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_names_an_array, get_args(annotation)))
