"""Shards on processes of this machine, each with a device: for several accelerators in one machine, without Ray."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

import torch

from lorary.cores import usable_cores
from lorary.train.attempts import Attempts, WorkerFailure, to_stderr
from lorary.train.executor import S

# For workers that are told to end: to write a checkpoint of what they have in training.
FAREWELL_S = 30.0
LAST_S = 5.0  # for a process to end once it is of no more use


def worker_devices(device: str, workers: int) -> list[str]:
    """The device of each worker: those that a word stands for, in turn.

    Args:
        device: `auto` or `cuda`, for all CUDA devices that this process may use; any other word stands for itself.
        workers: how many.
    """
    number = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    devices = [f"cuda:{index}" for index in range(number)] or [device]
    return [devices[worker % len(devices)] for worker in range(workers)]


class ProcessExecutor:
    """Runs shards on processes of this machine. Each loads the base once, on its device, and takes shard after shard.

    A shard that Lorary itself refuses is reported at once and not tried again; one that fails otherwise, or whose
    process dies, is tried again in a new process. The other shards are finished in either case, and the error is raised
    at the end. When this process is interrupted, the workers keep what they have in training; when it is killed, they
    end.

    Args:
        devices: of each worker; the same word may stand there several times.
        say: called with lines of progress; where None they go to stderr.
        debug: say tracebacks too.
    """

    def __init__(
        self, devices: Sequence[str], *, say: Callable[[str], None] | None = None, debug: bool = False
    ) -> None:
        self.devices, self.debug, self._say = list(devices), debug, say or to_stderr

    def run(self, work: Callable[[S], None], shards: Sequence[S]) -> None:
        """As `Executor.run`.

        Raises:
            TrainError: if a shard failed too often.
            LoraryError: as the work raised it.
        """
        attempts = Attempts(shards, self._say, debug=self.debug)
        devices = self.devices[: len(shards)]
        threads = max(1, len(usable_cores()) // max(1, len(devices)))
        workers = [_Worker(number, device, threads, self._say) for number, device in enumerate(devices, 1)]
        try:
            while attempts.left:
                for worker in workers:
                    if worker.shard is None and attempts.queue:
                        worker.begin(attempts.queue.popleft(), work, shards)
                _look(workers, attempts)
        finally:
            _dismiss(workers)
        attempts.raise_failed()


class _Worker:
    """A place for a process: its device, the process that has it now, and the shard that it works on."""

    def __init__(self, number: int, device: str, threads: int, say: Callable[[str], None]) -> None:
        self.number, self.device, self.threads, self.say = number, device, threads, say
        self.shard: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection[Any, Any] | None = None
        self._text = b""

    def __str__(self) -> str:
        return f"worker {self.number} ({self.device})"

    def begin(self, shard: int, work: Callable[[Any], None], shards: Sequence[Any]) -> None:
        """Start on a shard, in a new process where there is none."""
        if self.process is None:
            self._start()
        self.shard = shard
        assert self.connection is not None
        with suppress(OSError):  # it is gone, which is seen when its answer is waited for
            self.connection.send_bytes(pickle.dumps((work, shards[shard], self.device)))

    def _start(self) -> None:
        self.connection, other = Pipe()
        paths = [path or os.getcwd() for path in sys.path]
        self.process = subprocess.Popen(
            # It finds what this process finds, and nothing in the folder that happens to be the current one.
            [sys.executable, "-P", "-m", "lorary.train.process_worker", str(other.fileno())],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(other.fileno(),),
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
        )
        other.close()
        os.set_blocking(self.output.fileno(), False)
        self.say(f"{self} starts, process {self.process.pid}")

    @property
    def output(self) -> IO[bytes]:
        """What the process prints."""
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout

    def say_lines(self) -> None:
        """Say the whole lines that the process has printed."""
        while chunk := self.output.read(1 << 16):
            *lines, self._text = (self._text + chunk).split(b"\n")
            for line in lines:
                if line.strip():
                    self.say(f"worker {self.number}: {line.decode(errors='replace')}")

    def take_answer(self) -> WorkerFailure | None:
        """How its shard ended; a process that is gone, or spoilt by an unknown error, gives way to a new one."""
        assert self.connection is not None
        try:
            failure: WorkerFailure | None = self.connection.recv()
        except (EOFError, OSError):
            failure = WorkerFailure(None, f"the process is gone: {self.end()}")
        else:
            if failure is not None and failure.error is None:
                self.end()  # a device does not forget some errors while its process lives
        self.shard = None
        return failure

    def end(self) -> str:
        """End the process, and say how it ended."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.connection is not None
        self.connection.close()
        self.process.stdin.close()  # upon which it ends
        try:
            code = self.process.wait(LAST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.say_lines()
        self.output.close()
        self.process, self.connection, self._text = None, None, b""
        return signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"exit code {code}"


def _look(workers: Sequence[_Worker], attempts: Attempts) -> None:
    """Wait for something to happen, and take it."""
    ready = set(map(id, wait([*_open(workers, "output"), *_open(workers, "connection")])))
    for worker in workers:
        if worker.process is None:
            continue
        worker.say_lines()
        if worker.shard is not None and id(worker.connection) in ready:
            number = worker.shard
            failure = worker.take_answer()
            if failure is None:
                attempts.finish(number, str(worker))
            else:
                attempts.fail(number, failure, str(worker))
        elif worker.shard is None and worker.process.poll() is not None:
            worker.end()  # killed while it had nothing to do


def _open(workers: Sequence[_Worker], name: str) -> Iterator[Any]:
    return (getattr(worker, name) for worker in workers if worker.process is not None)


def _dismiss(workers: Sequence[_Worker]) -> None:
    """End all processes. Those at work are interrupted, so that they write a checkpoint first."""
    busy = [worker for worker in workers if worker.process is not None and worker.shard is not None]
    for worker in busy:
        assert worker.process is not None
        worker.process.send_signal(signal.SIGINT)
    until = time.monotonic() + FAREWELL_S
    while time.monotonic() < until and any(worker.process and worker.process.poll() is None for worker in busy):
        time.sleep(0.05)
        for worker in busy:
            worker.say_lines()  # one that cannot print would not end
    for worker in workers:
        if worker.process is not None:
            worker.end()
