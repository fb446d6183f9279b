"""Replicas as actors of a Ray cluster."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorary.errors import EngineError
from lorary.serve.engine import Engine
from lorary.serve.replica import Facts, Replica
from lorary.serve.replicas import START_S, LostError
from lorary.train.ray_cluster import cause_of, connected, plan_workers
from lorary.train.ray_pool import ray_kept_quiet

# Seconds without an answer after which the cluster's head counts as lost while replicas are begun.
_HEAD_TIMEOUT_S = 20.0


class RayLink:
    """Asks an actor; see `lorary.serve.replicas.Link`.

    Args:
        ray: the package.
        actor: a `Replica`.
    """

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    async def ask(self, question: str, *arguments: Any) -> Any:
        """Ask, and wait in the event loop.

        Raises:
            LostError: if the actor is gone.
        """
        try:
            result, error = await self._actor.answer.remote(question, *arguments)
        except self._ray.exceptions.RayError as lost:
            raise LostError(cause_of(lost)) from None
        if error is not None:
            raise error
        return result

    def ask_now(self, question: str, *arguments: Any) -> Any:
        """Ask from any thread, and wait.

        Raises:
            LostError: if the actor is gone.
            EngineError: if it takes too long.
        """
        errors = self._ray.exceptions
        try:
            result, error = self._ray.get(self._actor.answer.remote(question, *arguments), timeout=START_S)
        except errors.GetTimeoutError:
            raise EngineError("a replica must answer", found=f"it has not after {START_S:.0f} s") from None
        except errors.RayError as lost:
            raise LostError(cause_of(lost)) from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """End the process; any number of times."""
        self._ray.kill(self._actor)


@contextmanager
def ray_replicas(
    make: Callable[[], tuple[Engine, Facts]], number: int | None
) -> Iterator[tuple[Callable[[], RayLink], int]]:
    """Connect to a cluster, or start one, for the length of a run; what is printed to stdout meanwhile is dropped.

    Args:
        make: as for `Replica`; a function that can be pickled.
        number: of replicas; where None, one per GPU, or per machine where there is none.

    Yields:
        What starts a replica, and how many to start.

    Raises:
        MissingExtraError: if Ray is not installed.
        TrainError: if there is no cluster at RAY_ADDRESS.
    """
    with (
        ray_kept_quiet(debug=False),
        connected(None, number, head_timeout_s=_HEAD_TIMEOUT_S, debug=False) as cluster,
    ):
        number, needs = plan_workers(cluster.nodes, number)
        # One that ends is replaced by ours, which knows the library's version.
        kind = cluster.ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=0)(Replica)
        yield lambda: RayLink(cluster.ray, kind.remote(make)), number
