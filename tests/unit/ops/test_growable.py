"""Matrices that gain and lose rows in place."""

import torch

from lorary.ops.growable import append_rows, remove_rows, widen


def test_rows_are_appended_within_the_storage_that_doubles() -> None:
    matrix, expected, moves = torch.zeros(2, 3), torch.zeros(2, 3), 0
    for number in range(1, 60):
        rows = torch.full((1 + number % 2, 3), float(number))
        place = matrix.data_ptr()
        matrix, expected = append_rows(matrix, rows), torch.cat([expected, rows])
        moves += matrix.data_ptr() != place
        assert torch.equal(matrix, expected)
        assert matrix.is_contiguous()
    assert moves <= 6


def test_rows_are_removed_and_leave_room() -> None:
    matrix = append_rows(torch.arange(6.0).view(3, 2), torch.ones(1, 2))
    place = matrix.data_ptr()
    matrix = remove_rows(matrix, 1, 3)
    assert matrix.tolist() == [[0, 1], [1, 1]]
    assert append_rows(matrix, torch.ones(2, 2)).data_ptr() == place


def test_a_view_into_another_matrix_is_never_grown_over_it() -> None:
    whole = torch.arange(8.0).view(4, 2)
    grown = append_rows(whole[1:2], torch.zeros(1, 2))
    assert grown.tolist() == [[2, 3], [0, 0]]
    assert whole.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_widening_adds_zeros_once() -> None:
    matrix = torch.ones(2, 1)
    assert widen(matrix, 3).tolist() == [[1, 0, 0], [1, 0, 0]]
    assert widen(matrix, 1) is matrix
