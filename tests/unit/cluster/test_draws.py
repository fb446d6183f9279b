"""Initial draws are told from the factors."""

from collections.abc import Callable, Iterable

from lorary.adapter import Adapter
from lorary.cluster.draws import DrawDetector

Make = Callable[..., Adapter]


def initial_draws(adapters: Iterable[Adapter]) -> tuple[tuple[str, ...], ...]:
    detector = DrawDetector()
    for adapter in adapters:
        detector.add(adapter)
    return detector.groups()


def test_adapters_are_grouped_by_their_draw(made: Make) -> None:
    draws = {"a": "x", "b": "y", "c": "x", "d": "z", "e": "x", "f": "y"}
    found = initial_draws(made(name, group=0, draw=draw) for name, draw in draws.items())
    assert found == (("a", "c", "e"), ("b", "f"), ("d",))


def test_adapters_of_other_tasks_share_a_draw(made: Make) -> None:
    assert initial_draws([made("a", 0), made("b", 1)]) == (("a", "b"),)
