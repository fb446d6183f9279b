"""`lora`, `joint`, `mu`, `nearest`: what each task begins with; then all are trained in one pass."""

from collections.abc import Sequence

from lorary.adapt.context import AdaptContext
from lorary.adapt.retrieve import retrieve
from lorary.adapt.train import Start, train_from
from lorary.merge.mean import mean_of


def adapt_lora(context: AdaptContext, tasks: Sequence[str]) -> None:
    """`lora`: every task begins with nothing."""
    train_from(context, dict.fromkeys(tasks))


def adapt_mean(context: AdaptContext, tasks: Sequence[str]) -> None:
    """`joint` and `mu`: every task begins with the mean of the pool, which for joint is one adapter."""
    train_from(context, dict.fromkeys(tasks, _mean(context, context.pool.names)))


def adapt_nearest(context: AdaptContext, tasks: Sequence[str]) -> None:
    """`nearest`: every task begins with the mean of the adapters retrieved for it, which is one unless more are asked
    for.
    """
    train_from(context, {task: _mean(context, names) for task, names in retrieve(context, tasks).items()})


def _mean(context: AdaptContext, names: Sequence[str]) -> Start:
    made = mean_of([context.pool.get(name) for name in names], context.settings.mix, context.settings.rank)
    return Start(made.modules, context.pool.hashes_of(names), made.error)
