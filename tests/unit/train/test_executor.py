"""Executors: what happens to shards when work, workers or the whole cluster fail. Ray is played by a small stand-in."""

import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary import errors
from lorary.errors import LibraryError, LoraryError, MissingExtraError, TaskError, TrainError, UsageError
from lorary.train import ray_cluster, ray_schedule
from lorary.train.attempts import RETRIES, WorkerFailure
from lorary.train.choose_executor import make_executor
from lorary.train.executor import Executor, LocalExecutor
from lorary.train.ray_cluster import Cluster, Head, plan_workers
from lorary.train.ray_pool import RayExecutor
from lorary.train.ray_schedule import WorkerPool
from lorary.train.ray_worker import Lines, Worker, check_site, site_of


@dataclass(frozen=True)
class Piece:
    names: tuple[str, ...]
    library: str
    device: str = "auto"

    def on(self, device: str) -> "Piece":
        return replace(self, device=device)


class Death(BaseException):
    """Work raises it to say: this process is killed here."""


class GoneError(Exception):
    """What Ray raises for a call to an actor that is dead."""


class CallError(Exception):
    """What Ray raises where a call itself fails."""


@dataclass(eq=False)
class FakeRef:
    """A call that is made when Ray is asked for its answer."""

    actor: "FakeActor"
    name: str
    args: tuple[Any, ...]


class FakeActor:
    """An actor in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.is_alive, self.hangs, self.is_stopped = worker, True, False, False
        for name in ("hello", "run", "take_lines"):
            setattr(self, name, SimpleNamespace(remote=lambda *args, name=name: FakeRef(self, name, args)))
        self.stop = SimpleNamespace(remote=self._stop)

    def _stop(self) -> FakeRef:
        self.is_stopped = True
        return FakeRef(self, "stop", ())

    def answer(self, name: str, args: tuple[Any, ...]) -> Any:
        if not self.is_alive:
            raise GoneError("The actor died unexpectedly.\nThe actor is dead because it was killed")
        try:
            return getattr(self.worker, name)(*args)
        except Death:
            self.is_alive = False
            return self.answer(name, args)


class FakeRay:
    """As much of Ray as the pool uses."""

    exceptions = SimpleNamespace(RayActorError=GoneError, RayError=(GoneError, CallError))

    def __init__(self) -> None:
        self.actors: list[FakeActor] = []
        self.is_broken = False  # calls do not get through
        self.hanging: set[int] = set()  # actors, by the order in which they were made, that do not answer

    def remote(self, **_options: Any) -> Callable[[Any], Any]:
        def make(threads: int) -> FakeActor:
            actor = FakeActor(Worker(threads))
            actor.hangs = len(self.actors) in self.hanging
            self.actors.append(actor)
            return actor

        return lambda _kind: SimpleNamespace(remote=make)

    def wait(self, refs: Sequence[FakeRef], num_returns: int, timeout: float) -> tuple[list[FakeRef], list[FakeRef]]:
        assert num_returns == len(refs)
        done = [ref for ref in refs if not (ref.actor.hangs and ref.name != "hello")]
        time.sleep(0.1 if len(done) < len(refs) else 0)
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: FakeRef) -> Any:
        if self.is_broken and ref.name == "run":
            raise CallError("System error: No module named 'elsewhere'")
        return ref.actor.answer(ref.name, ref.args)

    def kill(self, actor: FakeActor) -> None:
        actor.is_alive = False


@pytest.fixture(autouse=True)
def _threads_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker sets this for its process, which is the test's own here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def ray() -> FakeRay:
    return FakeRay()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def pool(ray: FakeRay, said: list[str]) -> WorkerPool:
    cluster = Cluster(ray, Head([], 1.0), [{"CPU": 2.0}])
    return WorkerPool(cluster, 2, {"CPU": 1.0, "GPU": 0.0}, said.append, start_timeout_s=60.0)


def pieces(folder: Path, *names: str) -> list[Piece]:
    return [Piece((name,), str(folder)) for name in names]


def write_name(piece: Piece) -> None:
    print(f"at {piece.names[0]}", file=sys.stderr)
    Path(piece.library, piece.names[0]).touch()


def failing_first(times: int, error: BaseException, name: str) -> Callable[[Piece], None]:
    """Work that fails at one shard so many times."""
    left = [times]

    def work(piece: Piece) -> None:
        if piece.names[0] == name and left[0]:
            left[0] -= 1
            raise error
        write_name(piece)

    return work


def done(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- words


def test_each_word_makes_its_executor() -> None:
    assert isinstance(make_executor("local"), LocalExecutor)
    for word, address in (("ray", None), ("ray://auto", "auto"), ("ray://head:10001", "ray://head:10001")):
        executor = make_executor(word, workers=3)
        assert isinstance(executor, RayExecutor)
        assert isinstance(executor, Executor)
        assert (executor.address, executor.workers) == (address, 3)


@pytest.mark.parametrize("word", ["", "slurm", "rayon", "ray:", "ray://", "ray://a b", "ray:///x"])
def test_a_word_for_no_executor_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="--executor must be local, ray"):
        make_executor(word)


def test_no_workers_are_too_few() -> None:
    for make in (
        lambda: make_executor("local", workers=0),
        lambda: make_executor("ray", workers=0),
        lambda: RayExecutor(workers=0),
    ):
        with pytest.raises(UsageError, match="--workers must be at least 1"):
            make()


def test_in_this_process_shards_run_in_order_until_one_fails(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no rows"):
        LocalExecutor().run(failing_first(1, TaskError("no rows"), "b"), pieces(tmp_path, "a", "b", "c"))
    assert done(tmp_path) == ["a"]
    LocalExecutor().run(write_name, pieces(tmp_path, "b", "c"))
    assert done(tmp_path) == ["a", "b", "c"]


# --- the queue


def test_every_shard_is_worked_on_once_and_what_the_work_says_is_shown(
    pool: WorkerPool, ray: FakeRay, said: list[str], tmp_path: Path
) -> None:
    worked: list[str] = []
    pool.run(lambda piece: (worked.append(piece.names[0]), write_name(piece))[1], pieces(tmp_path, *"abcde"))
    assert sorted(worked) == done(tmp_path) == [*"abcde"]
    assert len(ray.actors) == 2  # who works on shard after shard, with what it holds in memory
    assert sum(line.endswith(": at c") for line in said) == 1
    assert any(line.endswith("5 of 5 shards are done") for line in said)


def test_no_more_workers_start_than_there_are_shards(pool: WorkerPool, ray: FakeRay, tmp_path: Path) -> None:
    pool.run(write_name, pieces(tmp_path, "only"))
    assert len(ray.actors) == 1


@pytest.mark.parametrize("failures", [1, RETRIES])
def test_the_shard_of_a_dead_worker_is_tried_again(
    pool: WorkerPool, ray: FakeRay, said: list[str], tmp_path: Path, failures: int
) -> None:
    pool.run(failing_first(failures, Death(), "b"), pieces(tmp_path, *"abcd"))
    assert done(tmp_path) == [*"abcd"]
    assert sum(not actor.is_alive for actor in ray.actors) == failures
    assert sum("is gone: The actor is dead because it was killed" in line for line in said) == failures


def test_a_shard_that_kills_every_worker_is_given_up_and_the_others_finish(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="expert 'b' must be trained within 4 tries") as caught:
        pool.run(failing_first(99, Death(), "b"), pieces(tmp_path, *"abcd"))
    assert "dead because it was killed" in str(caught.value)
    assert done(tmp_path) == [*"acd"]
    assert pool.attempts.tries == {1: RETRIES + 1}


def test_a_failure_that_may_pass_is_tried_again(
    pool: WorkerPool, ray: FakeRay, said: list[str], tmp_path: Path
) -> None:
    pool.run(failing_first(2, OSError(116, "Stale file handle"), "a"), pieces(tmp_path, *"abc"))
    assert done(tmp_path) == [*"abc"]
    assert any("Stale file handle" in line and "try 2 of 4 follows" in line for line in said)
    assert all(actor.is_alive for actor in ray.actors)


def test_what_lorary_refuses_is_not_tried_again_and_raised_as_it_was(
    pool: WorkerPool, said: list[str], tmp_path: Path
) -> None:
    error = UsageError("the rank must be at least 1", found=0, remedy="raise --rank")
    with pytest.raises(UsageError) as caught:
        pool.run(failing_first(99, error, "a"), pieces(tmp_path, *"abc"))
    assert str(caught.value) == "expert 'a': the rank must be at least 1\nfound: 0\nremedy: raise --rank"
    assert caught.value.exit_code == 2
    assert done(tmp_path) == [*"bc"]
    assert pool.attempts.tries == {0: 1}
    assert any("given up; the others go on" in line for line in said)


def test_several_failed_shards_make_one_error(pool: WorkerPool, tmp_path: Path) -> None:
    def work(piece: Piece) -> None:
        raise TaskError("no rows")

    names = tuple(f"task{i}" for i in range(5))
    with pytest.raises(TaskError) as caught:
        pool.run(work, [Piece(names, str(tmp_path)), *pieces(tmp_path, "b")])
    where = "experts 'task0', 'task1', 'task2' and 2 more (1 of 2 shards that failed, see above)"
    assert caught.value.rule == f"{where}: no rows"


def test_work_that_cannot_be_unpickled_over_there_is_an_error_at_last(
    pool: WorkerPool, ray: FakeRay, tmp_path: Path
) -> None:
    ray.is_broken = True
    with pytest.raises(TrainError, match="No module named 'elsewhere'"):
        pool.run(write_name, pieces(tmp_path, "a"))


def test_a_worker_that_answers_no_more_is_replaced(
    pool: WorkerPool, ray: FakeRay, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_schedule, "SILENCE_S", 0.05)
    ray.hanging = {0}
    pool.run(write_name, pieces(tmp_path, *"ab"))
    assert done(tmp_path) == [*"ab"]
    assert not ray.actors[0].is_alive
    assert any("was silent for 0 s" in line for line in said)


def test_workers_that_cannot_be_used_end_the_run(
    pool: WorkerPool, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = site_of(str(tmp_path))
    other.versions["torch"] = "0.1"
    monkeypatch.setattr(ray_schedule, "site_of", lambda _library: other)
    with pytest.raises(TrainError, match=r"a Ray worker must start\n.*one version of torch; found: .*0\.1"):
        pool.run(write_name, pieces(tmp_path, *"abc"))
    assert len(ray.actors) < RETRIES + 2 * pool.number  # it is not tried for ever
    assert done(tmp_path) == []


def test_a_worker_that_never_starts_ends_the_run_with_what_it_needs(
    pool: WorkerPool, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "wait", lambda refs, **_kwargs: ([], refs))
    pool.needs, pool.start_timeout_s = {"CPU": 4.0, "GPU": 1.0}, 0.0
    with pytest.raises(TrainError, match="each needs 4 CPU, 1 GPU, machines have 2 CPU, 0 GPU"):
        pool.run(write_name, pieces(tmp_path, "a"))


def test_a_lost_head_stops_the_workers_and_says_that_nothing_is_lost(
    pool: WorkerPool, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "PROBE_EVERY_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        pool.cluster.head.places = [server.getsockname()[:2]]
        pool.cluster.head.check()
    ray.hanging = {0, 1}
    pool.cluster.head.timeout_s = 0.4
    with pytest.raises(TrainError, match=r"must stay reachable during a build\nfound: no answer from 127.0.0.1"):
        pool.run(write_name, pieces(tmp_path, *"abc"))
    assert [actor.is_stopped for actor in ray.actors] == [True, True]


def test_a_client_that_loses_its_connection_is_the_same_error(
    pool: WorkerPool, ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_refs: Any, **_kwargs: Any) -> None:
        raise ConnectionError("the client is disconnected")

    monkeypatch.setattr(ray, "wait", wait)
    with pytest.raises(TrainError, match="must stay reachable"):
        pool.run(write_name, pieces(tmp_path, "a"))


# --- the worker's side


def test_a_worker_must_see_the_same_library(tmp_path: Path) -> None:
    (tmp_path / ".build.pid").write_text("12\n")
    here = site_of(str(tmp_path))
    check_site(here, "host")
    for other in (replace(here, holder="13"), replace(here, holder=None), replace(here, library="/nowhere")):
        with pytest.raises(LibraryError, match="every worker must see the library's folder"):
            check_site(other, "host")


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_survives_the_way_to_the_coordinator(name: str) -> None:
    kind = getattr(errors, name)
    if kind is MissingExtraError:
        error: LoraryError = MissingExtraError("wandb", "wandb")
    else:
        error = kind("the rule", found=3, remedy="do it")
    again = WorkerFailure(type(error), error.rule, error.found, error.remedy).raised("expert 'a'")
    assert type(again) is kind
    assert str(again) == f"expert 'a': {error}"


@given(st.lists(st.text(alphabet="ab \n", max_size=6), max_size=8), st.sets(st.integers(0, 7)))
def test_lines_come_out_whole_wherever_they_are_cut(parts: list[str], takes: set[int]) -> None:
    stream, taken = Lines(), []
    for number, part in enumerate([*parts, "\n"]):
        stream.write(part)
        if number in takes:
            taken += stream.take()
    taken += stream.take()
    assert taken == [line for line in "".join(parts).split("\n") if line.strip()]


# --- the cluster


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=5),
    st.none() | st.integers(1, 40),
)
def test_the_workers_that_are_planned_fit_or_take_the_least(
    machines: list[tuple[int, int]], workers: int | None
) -> None:
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    number, needs = plan_workers(nodes, workers)
    assert number == workers or workers is None
    cpus, share = needs["CPU"], needs["GPU"]
    assert (share > 0) == any(gpus for _, gpus in machines)
    room = sum(min(c // cpus, g // share if share else c) for c, g in machines)
    assert room >= number or (cpus == 1 and share in (0, 1))
    # One CPU more for each would not fit.
    more = sum(min(c // (cpus + 1), g // share if share else c) for c, g in machines)
    assert more < number


@pytest.mark.parametrize(
    ("nodes", "workers", "planned"),
    [
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}], None, (4, 4.0, 1.0)),
        ([{"CPU": 8.0, "GPU": 1.0}], 4, (4, 2.0, 0.25)),
        ([{"CPU": 5.0}, {"CPU": 2.0}], None, (2, 2.0, 0.0)),
        ([{"CPU": 2.0}], 2, (2, 1.0, 0.0)),
        ([{"memory": 1.0}], None, (1, 1.0, 0.0)),
    ],
)
def test_a_cluster_is_divided(nodes: Any, workers: int | None, planned: tuple[int, float, float]) -> None:
    number, needs = plan_workers(nodes, workers)
    assert (number, needs["CPU"], needs["GPU"]) == planned


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"lorary\[ray\]"):
        RayExecutor().run(write_name, pieces(tmp_path, "a"))


def test_without_shards_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    RayExecutor().run(write_name, [])


@pytest.mark.parametrize("by_environment", [False, True])
def test_where_no_cluster_answers_the_error_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'lorary[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address if by_environment else "127.0.0.1:1")
    executor = RayExecutor(None if by_environment else address)
    with pytest.raises(TrainError, match=rf"a Ray cluster must answer at '{address}'\nfound: nobody listens there"):
        executor.run(write_name, pieces(tmp_path, "a"))
