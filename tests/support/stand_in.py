"""A stand-in for an accelerator: the meta device, and a mode that writes down whenever the host would wait for it.

Tensors on the meta device have no values. Tensors of the host keep theirs. So whatever looks at a value of the device,
or makes a shape of one, cannot go unseen. PyTorch lets operators on the meta device and on the host mix in places where
a real device would not; the mode refuses that.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_ATEN = torch.ops.aten
_LOOKS = {_ATEN._local_scalar_dense, _ATEN.equal, _ATEN.is_nonzero}
_SHAPES = {
    _ATEN.nonzero, _ATEN.masked_select, _ATEN._unique, _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive,
    _ATEN.unique_dim_consecutive, _ATEN.bincount, _ATEN.histc,
}  # fmt: skip
_INDEXED = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_, _ATEN._unsafe_index}
_COPIES = {_ATEN._to_copy, _ATEN.copy_, _ATEN.copy}
_MADE = {torch.tensor, torch.as_tensor, torch.asarray}
_PLACES = ("/lorary/", "/transformers/", "/tests/")


@dataclass(frozen=True)
class Event:
    """One thing that a device does not like.

    Args:
        kind: `look` (the host waits for a value), `shape` (that depends on values, so the host waits too), `download`,
            `upload` (CUDA waits until the device has it, and so for all that was asked of the device before), `queued`
            (an upload with `non_blocking`), or `mixed` (tensors of the host and of the device in one operator).
        operator: that did it.
        file: of the innermost code of Lorary, transformers or the tests.
        line: there.
    """

    kind: str
    operator: str
    file: str
    line: int

    @property
    def is_ours(self) -> bool:
        """Whether Lorary did it."""
        return "/lorary/" in self.file

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device."""
        return self.kind != "queued"

    def __str__(self) -> str:
        return f"{self.kind} by {self.operator} at {Path(self.file).name}:{self.line}"


class StandIn(TorchDispatchMode):
    """Writes down events; a value that is looked at is 1, or True."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._making = _Making(self)

    @property
    def ours(self) -> list[str]:
        """What Lorary did, in words."""
        return [str(event) for event in self.events if event.is_ours]

    @property
    def waits(self) -> list[str]:
        """Where Lorary made the host wait, in words."""
        return [str(event) for event in self.events if event.is_ours and event.waits]

    def __enter__(self) -> "StandIn":
        self._making.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._making.__exit__(*error)

    def note(self, kind: str, operator: object) -> None:
        """Write an event down, with the place it comes from."""
        frame = sys._getframe(1)
        while frame.f_back is not None and not _is_code(frame.f_code.co_filename):
            frame = frame.f_back
        self.events.append(Event(kind, str(operator), frame.f_code.co_filename, frame.f_lineno))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        if packet in _COPIES:
            return self._copied(func, args, kwargs, tensors)
        if not on_device:
            return func(*args, **kwargs)
        if packet in _LOOKS:
            self.note("look", func)
            return True if on_device[0].dtype == torch.bool or packet is not _ATEN._local_scalar_dense else 1
        is_masked = packet in _INDEXED and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if is_masked or packet in _SHAPES or func is _ATEN.repeat_interleave.Tensor:
            self.note("shape", func)
            raise AssertionError(str(self.events[-1]))
        if any(tensor.dim() for tensor in tensors if not tensor.is_meta):
            self.note("mixed", func)
            raise AssertionError(str(self.events[-1]))
        # Most operators take a number of the host as it is. This one copies it to the device.
        if packet is _ATEN.where and len(on_device) < len(tensors):
            self.note("upload", func)
        return func(*args, **kwargs)

    def _copied(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        target = kwargs.get("device")
        if func.overloadpacket is _ATEN._to_copy:
            goes_to = tensors[0].device if target is None else torch.device(target)
            if tensors[0].is_meta and goes_to.type == "cpu":
                self.note("download", func)
                return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            if goes_to.type == "meta" and not tensors[0].is_meta:
                self.note("queued" if kwargs.get("non_blocking") else "upload", func)
            return func(*args, **kwargs)
        into, source = args[0], args[1]
        if into.is_meta != source.is_meta:
            is_queued = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            self.note(("queued" if is_queued else "upload") if into.is_meta else "download", func)
            if not into.is_meta:
                return into
        return func(*args, **kwargs)


class _Making(TorchFunctionMode):
    """Sees numbers of Python that become a tensor on the device: operators do not."""

    def __init__(self, mode: StandIn) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in _MADE and device is not None and torch.device(device).type == "meta":
            self.mode.note("upload", func.__name__)
        return func(*args, **kwargs)


def _is_code(file: str) -> bool:
    return any(place in file for place in _PLACES) and not file.endswith(("stand_in.py", "checked.py"))


def on_device(tensors: Any) -> Any:
    """The same tensors on the stand-in, in whatever they are kept."""
    return tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, tensors)
