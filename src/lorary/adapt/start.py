"""`lora`, `joint`, `mu`, `nearest`: what each task begins with; then all are trained in one pass."""

from collections.abc import Sequence

from lorary.adapt.context import Shop
from lorary.adapt.retrieve import retrieve
from lorary.adapt.train import Start, train_from
from lorary.merge.mean import mean_of


def adapt_lora(shop: Shop, tasks: Sequence[str]) -> None:
    """`lora`: every task begins with nothing."""
    train_from(shop, dict.fromkeys(tasks))


def adapt_mean(shop: Shop, tasks: Sequence[str]) -> None:
    """`joint` and `mu`: every task begins with the mean of the pool, which for joint is one adapter."""
    train_from(shop, dict.fromkeys(tasks, _mean(shop, shop.pool.names)))


def adapt_nearest(shop: Shop, tasks: Sequence[str]) -> None:
    """`nearest`: every task begins with the mean of the adapters retrieved for it, which is one unless more are asked
    for.
    """
    train_from(shop, {task: _mean(shop, names) for task, names in retrieve(shop, tasks).items()})


def _mean(shop: Shop, names: Sequence[str]) -> Start:
    made = mean_of([shop.pool.get(name) for name in names], shop.settings.mix, shop.settings.rank)
    return Start(made.modules, shop.pool.hashes_of(names), made.error)
