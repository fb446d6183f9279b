"""Keys and values of rows that come and go, against plain lists of them."""

import random

import pytest
import torch
from torch import Tensor

from lorary.serve.row_cache import RowCache

HEADS, WIDTH = 2, 3


def states(length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, HEADS, length, WIDTH, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_what_they_were_given_whatever_comes_and_goes(seed: int, generator: torch.Generator) -> None:
    chance, cache = random.Random(seed), RowCache(num_layers=2)
    expected: list[Tensor] = []
    for _ in range(150):
        if not expected or chance.random() < 0.3:
            expected.append(states(chance.randint(1, 90), generator))
            cache.add([(expected[-1], -expected[-1]), None], expected[-1].shape[2])
        elif chance.random() < 0.3:
            row = chance.randrange(len(expected))
            cache.drop(row, wipe=chance.random() < 0.5)
            expected[row] = expected[-1]
            expected.pop()
        else:
            new = torch.cat([states(1, generator) for _ in expected])
            seen, _ = cache.states.update(new, -new, 0)
            expected = [torch.cat([old, new[i : i + 1]], dim=2) for i, old in enumerate(expected)]
            mask = cache.mask(1)
            assert mask.shape == (len(expected), seen.shape[2])
            for row, tensor in enumerate(expected):
                assert torch.equal(seen[row : row + 1, :, mask[row].bool()], tensor)
                assert bool(mask[row, -tensor.shape[2] :].all())
            cache.advance(1)
        assert cache.num_rows == len(expected)
        assert cache.num_columns == max((tensor.shape[2] for tensor in expected), default=0)
        for row, tensor in enumerate(expected):
            pair, nothing = cache.row(row)
            assert pair is not None
            assert nothing is None
            assert torch.equal(pair[0], tensor)
            assert torch.equal(pair[1], -tensor)
    while expected:
        cache.drop(0)
        expected.pop()
    assert cache.num_bytes == 0


def test_buffers_do_not_grow_with_what_has_gone(generator: torch.Generator) -> None:
    cache, sizes = RowCache(num_layers=1), set()
    cache.add([(states(20, generator), states(20, generator))], 20)
    for _ in range(100):  # always one row at least, so that nothing is ever given back
        cache.add([(states(20, generator), states(20, generator))], 20)
        for _ in range(30):
            new = states(1, generator).expand(cache.num_rows, -1, -1, -1)
            cache.states.update(new, new, 0)
            cache.advance(1)
        cache.drop(0)
        sizes.add(cache.num_bytes)
    assert max(sizes) <= 4 * min(sizes)
    assert len(sizes) < 5


def test_what_is_no_number_does_not_stay(generator: torch.Generator) -> None:
    cache = RowCache(num_layers=1)
    for length in (30, 30):
        cache.add([(states(length, generator), states(length, generator))], length)
    new = torch.full((2, HEADS, 1, WIDTH), torch.nan)
    new[0] = 0
    cache.states.update(new, new, 0)
    cache.advance(1)
    cache.drop(1, wipe=True)
    cache.add([(states(4, generator), states(4, generator))], 4)
    seen, _ = cache.states.update(torch.zeros(2, HEADS, 1, WIDTH), torch.zeros(2, HEADS, 1, WIDTH), 0)
    assert bool(seen.isfinite().all())


def test_prompts_are_read_in_pieces(generator: torch.Generator) -> None:
    cache = RowCache(num_layers=1)
    cache.begin([5, 2])
    whole = torch.cat([states(5, generator) for _ in range(2)])
    for start, stop in ((0, 3), (3, 5)):
        assert cache.mask(stop - start).tolist() == [[1] * stop, ([0, 0, 0, 1, 1])[:stop]]
        cache.states.update(whole[:, :, start:stop], whole[:, :, start:stop], 0)
        cache.advance(stop - start)
    for row, length in enumerate((5, 2)):
        (pair,) = cache.row(row)
        assert pair is not None
        assert torch.equal(pair[0], whole[row : row + 1, :, 5 - length :])
