"""Layers that are given the tokens of all rows along one axis, as OPT's feed-forward layers are: who knows the rows.

The module that holds such a layer is given (batch, seq, d) and flattens it. What is seated beside the layer is shown
the rows again, so that it may tell them apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorary.lora.context import PerThread, is_backward, note_thread

ROWS = "_lorary_rows"


@dataclass
class _Call:
    """What the holder was given last; None before its first call."""

    size: Size | None = None
    is_running: bool = False


class Rows:
    """Hooks of the module that holds a layer: they note (batch, seq) of what it is given, for each thread.

    A layer that is called by itself is given what the caller means: only calls inside of the holder's count, and those
    of a backward pass, which computes layers anew.
    """

    def __init__(self) -> None:
        self._calls = PerThread(_Call)

    def begin(self, _holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook with keywords."""
        note_thread()
        call = self._calls.here
        states = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        call.size = states.shape[:2] if states is not None and states.dim() == 3 else None
        call.is_running = True

    def end(self, *_call: object) -> None:
        """A forward hook, also of calls that fail."""
        self._calls.here.is_running = False

    def of(self, x: Tensor) -> Size | None:
        """(batch, seq) of a layer's input, None where its tokens are not those that its holder was given."""
        call = self._calls.here
        if call.size is None or not (call.is_running or is_backward()):
            return None
        return call.size if x.dim() == 2 and call.size.numel() == len(x) else None


class _Mark:
    """The `Rows` of a layer, as something that can be taken away."""

    def __init__(self, layer: nn.Module, rows: Rows) -> None:
        self.layer = layer
        vars(layer)[ROWS] = rows

    def remove(self) -> None:
        """Forget them."""
        vars(self.layer).pop(ROWS, None)


def note_rows(model: nn.Module, paths: Iterable[str]) -> list[RemovableHandle | _Mark]:
    """Let layers know the rows of what they are given.

    Args:
        model: changed in place.
        paths: of linear layers that are given (batch * seq, d), in the order of the rows.

    Returns:
        Handles; none for layers that know already, or lie in a list that is no module with a call of its own.
    """
    handles: list[RemovableHandle | _Mark] = []
    noted: dict[str, Rows] = {}
    for path in paths:
        layer, place = model.get_submodule(path), path.rpartition(".")[0]
        holder = model.get_submodule(place)
        if ROWS in vars(layer) or isinstance(holder, (nn.ModuleList, nn.ModuleDict)):
            continue
        if place not in noted:
            noted[place] = rows = Rows()
            handles.append(holder.register_forward_pre_hook(rows.begin, with_kwargs=True))
            handles.append(holder.register_forward_hook(rows.end, always_call=True))
        handles.append(_Mark(layer, noted[place]))
    return handles
