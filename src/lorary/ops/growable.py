"""Matrices that gain and lose rows in place: what lets an expert come and go without building a layer anew."""

import torch
from torch import Tensor


def append_rows(matrix: Tensor, rows: Tensor) -> Tensor:
    """A matrix with rows added at its end, in amortised time of those rows alone.

    The spare room is the tail of the matrix's own storage: where it is used up, one of twice the size takes its place.

    Args:
        matrix: (n, width), contiguous; must not be used any more.
        rows: (m, width), of its dtype and device.

    Returns:
        (n + m, width), a view of the storage of `matrix` where that has room.
    """
    old, new = matrix.shape[0], rows.shape[0]
    needed = (old + new) * matrix.shape[1] * matrix.element_size()
    if matrix.storage_offset() or matrix.untyped_storage().nbytes() < needed:
        grown = matrix.new_empty(max(2 * old, old + new), matrix.shape[1])
        grown[:old] = matrix
        matrix = grown
    matrix = matrix.as_strided((old + new, matrix.shape[1]), (matrix.shape[1], 1))
    matrix[old:] = rows
    return matrix


def remove_rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    """A matrix without some rows: those behind them move up, in time of those alone.

    Args:
        matrix: (n, ...), contiguous; must not be used any more.
        start: the first row to go.
        stop: the first row behind them.

    Returns:
        (n - stop + start, ...), a view of the storage of `matrix`.
    """
    num_left = matrix.shape[0] - (stop - start)
    matrix[start:num_left] = matrix[stop:].clone()
    return matrix[:num_left]


def widen(matrix: Tensor, width: int) -> Tensor:
    """A matrix with columns of zeros added up to a width; itself where it is that wide already."""
    missing = width - matrix.shape[1]
    return matrix if missing <= 0 else torch.nn.functional.pad(matrix, (0, missing))
