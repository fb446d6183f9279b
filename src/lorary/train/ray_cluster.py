"""The Ray cluster of a build: connecting to it, cutting it into workers, and noticing that it is gone."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorary.errors import MissingExtraError, TrainError
from lorary.train.attempts import NEXT_RUN

CLIENT_PORT = 10001  # where `ray start --head` listens for ray://HOST
# Nothing of size passes through Ray: shards are names and settings, weights go through the library's folder.
OBJECT_STORE_BYTES = 100 * 2**20
PROBE_EVERY_S, PROBE_TIMEOUT_S = 2.0, 2.0


@dataclass
class Head:
    """The processes that a cluster cannot do without, asked now and then whether they still listen.

    Ray itself ends the whole process, with no exception to catch, a minute after it lost its head; this notices first.

    Args:
        places: host and port of the head, and of Ray's daemon on this machine where there is one.
        timeout_s: seconds without an answer after which one counts as lost.
    """

    places: Sequence[tuple[str, int]]
    timeout_s: float
    _answered_at: float = field(default_factory=time.monotonic)
    _probed_at: float = 0.0

    def check(self) -> None:
        """Ask, unless it was asked a moment ago.

        Raises:
            TrainError: if one has not answered for too long.
        """
        now = time.monotonic()
        if now - self._probed_at < PROBE_EVERY_S:
            return
        silent = [f"{host}:{port}" for host, port in self.places if not listens((host, port))]
        self._probed_at = time.monotonic()
        if not silent:
            self._answered_at = self._probed_at
        elif now - self._answered_at > self.timeout_s:
            raise lost(f"no answer from {silent[0]} for {now - self._answered_at:.0f} s")


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to.

    Args:
        ray: the package.
        head: of the cluster.
        nodes: resources (CPU, GPU, ...) of each machine that is alive.
    """

    ray: Any
    head: Head
    nodes: Sequence[Mapping[str, float]]


def lost(reason: str) -> TrainError:
    """The error of a cluster that is gone."""
    return TrainError("the Ray cluster must stay reachable during a build", found=reason, remedy=NEXT_RUN)


def cause_of(error: Exception) -> str:
    """The one line of Ray's long messages that says what happened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    telling = [line for line in lines if line.startswith("The actor is dead")] or lines[-1:]
    return telling[0].split(" Some common causes")[0].strip()[:300]


def listens(place: tuple[str, int]) -> bool:
    """Whether a process accepts connections there."""
    try:
        socket.create_connection(place, timeout=PROBE_TIMEOUT_S).close()
    except OSError:
        return False
    return True


@contextmanager
def connected(address: str | None, workers: int | None, *, head_timeout_s: float, debug: bool) -> Iterator[Cluster]:
    """Connect to a cluster, or start one, for the length of a run.

    A cluster that this process was connected to before is used as it is and left so.

    Args:
        address: as for `RayExecutor`.
        workers: as for `RayExecutor`; a cluster started here gets a CPU for each.
        head_timeout_s: as for `Head`.
        debug: show Ray's log.

    Yields:
        The cluster.

    Raises:
        MissingExtraError: if Ray is not installed.
        TrainError: if there is no such cluster.
    """
    ray = import_ray(is_client=(address or os.environ.get("RAY_ADDRESS", "")).startswith("ray://"))
    is_ours = not ray.is_initialized()
    client = _start(ray, address, workers, debug) if is_ours else None
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        head = Head([client] if client else _vital(ray, nodes), head_timeout_s)
        yield Cluster(ray, head, [node["Resources"] for node in nodes])
    finally:
        if is_ours:
            ray.shutdown()


def import_ray(*, is_client: bool = False) -> Any:
    """The package, which is an extra.

    Args:
        is_client: whether it shall connect as a Ray Client.

    Raises:
        MissingExtraError: if it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing talks to the network unless it was named
    if is_client and (Path.home() / ".ray" / "auth_token").exists():
        # Ray shows the cluster's token by itself where it joins a cluster, but not as a client, before it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray


def _start(ray: Any, address: str | None, workers: int | None, debug: bool) -> tuple[str, int] | None:
    """Connect to the address, or start a cluster on this machine. Returns where a Ray Client was served, if it was."""
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    client = _place(address) if address.startswith("ray://") else None
    if client:
        address = f"ray://{client[0]}:{client[1]}"  # Ray wants the port
    words: dict[str, Any] = {"log_to_driver": debug, "logging_level": "info" if debug else "error"}
    if address == "local":
        words |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        # Ray counts a machine's cores; asked for more workers than that, it shall start them all the same.
        words["num_cpus"] = max(workers or 1, os.cpu_count() or 1)
    elif address != "auto" and not listens(_place(address)):
        raise _not_reached(address, "nobody listens there")
    try:
        ray.init(address=address, **words)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ImportError) as error:
        raise _not_reached(address, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return client


def _vital(ray: Any, nodes: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Where the head listens, and Ray's daemon on this machine."""
    context = ray.get_runtime_context()
    local = [node for node in nodes if node["NodeID"] == context.get_node_id()]
    return [_place(context.gcs_address), *((node["NodeManagerAddress"], node["NodeManagerPort"]) for node in local)]


def _place(address: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT or ray://HOST:PORT."""
    host, colon, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    return (host, int(port)) if colon and port.isdigit() else (host + colon + port, CLIENT_PORT)


def _not_reached(address: str, reason: str) -> TrainError:
    token = "give this machine the head's token and RAY_AUTH_MODE=token, " if address.startswith("ray://") else ""
    return TrainError(
        f"a Ray cluster must answer at '{address}'", found=reason,
        remedy=f"start it with `ray start --head`, {token}or build here with --executor ray or local",
    )  # fmt: skip


def plan_workers(nodes: Sequence[Mapping[str, float]], workers: int | None) -> tuple[int, dict[str, float]]:
    """How many workers to start, and what each of them takes.

    Each worker gets a whole GPU, or the largest power of 1/2 of one that lets all find a place, and then as many CPUs
    as all can have. Where the cluster has too little now (machines may join later), a worker takes the least.

    Args:
        nodes: resources of each machine.
        workers: how many; where None, one per GPU, or per machine where there is none.

    Returns:
        Number of workers; CPUs and GPUs of each.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    number = workers or gpus or sum(node.get("CPU", 0) >= 1 for node in nodes) or 1
    shares = [2.0**-i for i in range(5)] if gpus else [0.0]
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    for share in shares:
        for cpus in range(most, 0, -1):
            if sum(_room(node, cpus, share) for node in nodes) >= number:
                return number, {"CPU": float(cpus), "GPU": share}
    return number, {"CPU": 1.0, "GPU": shares[0]}


def _room(node: Mapping[str, float], cpus: int, share: float) -> int:
    """Workers that a machine can hold."""
    room = int(node.get("CPU", 0) // cpus)
    return min(room, int(node.get("GPU", 0) / share)) if share else room
