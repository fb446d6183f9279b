"""Keyed randomness: the same in every process and release, and different for every key."""

import torch

from lorary.keys import keyed_generator


def draw(*key: object) -> list[int]:
    return torch.randint(1000, (4,), generator=keyed_generator(*key)).tolist()


def test_the_numbers_of_a_key_are_pinned() -> None:
    # A change here changes every library that is built from a seed: it needs a line in the changelog.
    assert keyed_generator("init", 0, "q_proj").initial_seed() == 7543178083696817246
    assert draw("init", 0, "q_proj") == [749, 653, 991, 988]


def test_a_key_is_all_that_matters() -> None:
    first = draw("dropout", 1, "a")
    torch.rand(3)
    assert draw("dropout", 1, "a") == first


def test_the_parts_of_a_key_are_not_run_together() -> None:
    assert len({tuple(draw(*key)) for key in [("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ("a b",)]}) == 5
