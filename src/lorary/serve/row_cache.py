"""Keys and values of rows that come and go: all rows end at one place, so that a step writes one column.

It is the layout of `generate`, padding on the left, kept from step to step: what a family of models computes from it is
what it computes there (docs/adr/0014).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Columns that are kept free behind the last one, so that most steps neither grow nor move anything.
SPARE = 64
# Keys and values (1, heads, tokens, width) of one row, one pair for each layer; None for layers that keep none.
RowStates = list[tuple[Tensor, Tensor] | None]


@dataclass
class _Window:
    """Which columns are in use, of all layers alike."""

    start: int = 0
    stop: int = 0
    num_rows: int = 0


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, in buffers that are larger than what is in use: (rows, heads, columns, width)."""

    is_sliding = False  # a reach that is shorter than the text is a matter of the mask
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first states."""
        self.is_initialized = True
        self.reserve(key_states, value_states, self.window.num_rows, self.window.stop + key_states.shape[2])

    def reserve(self, key_states: Tensor, value_states: Tensor, num_rows: int, stop: int) -> None:
        """Have room for rows and columns; what is in use stays.

        Args:
            key_states: of any row, for shape and kind.
            value_states: likewise.
            num_rows: rows to hold.
            stop: columns to hold.
        """
        self.keys = _grown(self.keys, key_states, num_rows, stop)
        self.values = _grown(self.values, value_states, num_rows, stop)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of a pass behind the others; all that there are then."""
        window, stop = self.window, self.window.stop + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states, value_states, window.num_rows, stop)
        both = []
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            assert buffer is not None
            buffer[: window.num_rows, :, window.stop : stop] = states
            both.append(buffer[: window.num_rows, :, window.start : stop])
        return both[0], both[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a pass sees, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.window.stop - self.window.start

    def get_max_length(self) -> int:
        """There is none."""
        return -1


class RowCache:
    """Keys and values of the rows of a batch.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._window = _Window()
        self._layers = [_Layer(self._window) for _ in range(num_layers)]
        self.states = Cache(layers=list(self._layers))
        self._begins: list[int] = []

    @property
    def num_rows(self) -> int:
        """Rows that there are."""
        return len(self._begins)

    @property
    def num_columns(self) -> int:
        """Tokens of the longest row."""
        return self._window.stop - self._window.start

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        tensors = (tensor for layer in self._layers for tensor in (layer.keys, layer.values) if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def begin(self, lengths: Sequence[int]) -> None:
        """Expect rows of these lengths, none of whose tokens was seen yet; the cache must be empty.

        Args:
            lengths: tokens of each row, padded on the left up to the longest.
        """
        longest = max(lengths)
        self._begins = [longest - length for length in lengths]
        self._window.num_rows = len(lengths)

    def mask(self, num_new: int) -> Tensor:
        """(rows, columns) int64: 1 for real tokens, those of a pass of `num_new` columns counted."""
        columns = torch.arange(self._window.start, self._window.stop + num_new)
        return (columns >= torch.tensor(self._begins)[:, None]).long()

    def advance(self, num_new: int) -> None:
        """A pass has ended that wrote so many columns."""
        self._window.stop += num_new

    def row(self, row: int, length: int | None = None) -> RowStates:
        """What is kept of a row, in place; of its first `length` tokens, of all where None."""
        begin = self._begins[row]
        stop = self._window.stop if length is None else begin + length
        return [
            None
            if layer.keys is None or layer.values is None
            else (layer.keys[row : row + 1, :, begin:stop], layer.values[row : row + 1, :, begin:stop])
            for layer in self._layers
        ]

    def add(self, states: RowStates, length: int) -> None:
        """One more row, behind the others.

        Args:
            states: of it.
            length: its tokens.
        """
        window = self._window
        if not self._begins:
            window.start = window.stop = 0
        self._make_room(max(length - window.stop, 0))
        window.stop = max(window.stop, length)
        window.num_rows += 1
        self._begins.append(window.stop - length)
        for layer, pair in zip(self._layers, states, strict=True):
            if pair is not None:
                layer.is_initialized = True
                layer.reserve(*pair, window.num_rows, window.stop + SPARE)
                assert layer.keys is not None
                assert layer.values is not None
                layer.keys[window.num_rows - 1, :, window.stop - length : window.stop] = pair[0][0]
                layer.values[window.num_rows - 1, :, window.stop - length : window.stop] = pair[1][0]
        window.start = min(self._begins)

    def drop(self, row: int, *, wipe: bool = False) -> None:
        """Forget a row; the last one takes its place. Without rows there are no buffers.

        Args:
            row: which.
            wipe: whether it may hold what is no number: a mask does not hide that from the row that comes next.
        """
        window, last = self._window, len(self._begins) - 1
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                if buffer is not None:
                    if wipe:
                        buffer[row] = 0
                    if row != last:
                        begin = self._begins[last]
                        buffer[row, :, begin : window.stop] = buffer[last, :, begin : window.stop]
        self._begins[row] = self._begins[last]
        self._begins.pop()
        window.num_rows = last
        if not self._begins:
            window.start = window.stop = 0
            for layer in self._layers:
                layer.keys = layer.values = None
                layer.is_initialized = False
            return
        window.start = min(self._begins)
        if window.start > window.stop - window.start:  # most of the buffers is behind us
            self._move(-window.start)

    def _make_room(self, num_columns: int) -> None:
        """Move all rows to the right."""
        if num_columns and self._begins:
            for layer in self._layers:
                if layer.keys is not None and layer.values is not None:
                    layer.reserve(layer.keys, layer.values, self._window.num_rows, self._window.stop + num_columns)
            self._move(num_columns)

    def _move(self, by: int) -> None:
        window = self._window
        for layer in self._layers:
            for buffer in (layer.keys, layer.values):
                if buffer is not None:
                    moved = buffer[: window.num_rows, :, window.start : window.stop].clone()
                    buffer[: window.num_rows, :, window.start + by : window.stop + by] = moved
        window.start, window.stop = window.start + by, window.stop + by
        self._begins = [begin + by for begin in self._begins]


def _grown(buffer: Tensor | None, states: Tensor, num_rows: int, stop: int) -> Tensor:
    """A buffer with room for rows and columns: itself, or a larger copy."""
    if buffer is not None and len(buffer) >= num_rows and buffer.shape[2] >= stop:
        return buffer
    old_rows, old_columns = (0, 0) if buffer is None else (len(buffer), buffer.shape[2])
    rows = old_rows if old_rows >= num_rows else max(num_rows, 2 * old_rows)
    columns = old_columns if old_columns >= stop else stop + max(SPARE, old_columns // 4)
    # Zeros: what a mask hides is multiplied by 0, and must be a number.
    grown = states.new_zeros(rows, states.shape[1], columns, states.shape[3])
    if buffer is not None:
        grown[:old_rows, :, :old_columns] = buffer
    return grown
