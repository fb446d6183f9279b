"""`lorary serve --executor ray` with two replicas: one is killed under load, and the library changes under load."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import PROMPT, another_adapter, make_library, text_of

from lorary.library.store import Library

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lorary[ray]'")

TIMEOUT_S = 300.0


class Served:
    """The command in a process of its own."""

    def __init__(self, library: Path, folder: str) -> None:
        own = {"HOME": folder, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        names = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        options = ["--executor", "ray", "--replicas", "2", "--port", "0", "--drain", "20"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorary", "serve", str(library), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**names, **own},
        )  # fmt: skip
        self.lines: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(stream,)) for stream in (self.process.stdout, self.process.stderr)
        ]
        for thread in self._threads:
            thread.start()
        self.family: list[psutil.Process] = []
        self.client = httpx.Client(timeout=TIMEOUT_S)

    def begin(self) -> None:
        try:
            self.client.base_url = httpx.URL(self.wait_for(r"serving lib at (\S+)") + "/v1")
        finally:
            self.family = psutil.Process(self.process.pid).children(recursive=True)

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line.rstrip())

    def wait_for(self, pattern: str) -> str:
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"no line with {pattern!r}:\n" + "\n".join(self.lines))

    def replicas(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if process.is_running() and "ray::Replica" in " ".join(process.cmdline())]

    def answer(self, model: str, num_tokens: int, session: str | None = None) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "logprobs": 0}
        headers = {} if session is None else {"x-session-id": session}
        return self.client.post("/completions", json=body, headers=headers)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.client.close()
        for process in self.family:
            if process.is_running():
                process.kill()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Asking:
    """Requests one after the other from threads, as long as the block lasts."""

    def __init__(self, served: Served, number: int) -> None:
        self.served, self.responses, self.is_over = served, [], False
        self._threads = [threading.Thread(target=self._ask, args=(f"session {i}",)) for i in range(number)]

    def _ask(self, session: str) -> None:
        while not self.is_over:
            self.responses.append(self.served.answer("lib:june", 100, session))

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.is_over = True
        for thread in self._threads:
            thread.join()


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    return make_library(tmp_path / "lib", tiny_base_folder)


@pytest.fixture
def served(library: Library) -> Iterator[Served]:
    # A short path: sockets lie in it.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    served = Served(library.path, folder)
    try:
        served.begin()
        yield served
    finally:
        served.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_replicas_are_replaced_and_follow_the_library_under_load(
    served: Served, library: Library, tiny_base_folder: Path
) -> None:
    expected = text_of(library, tiny_base_folder, "june", 100)
    replicas = served.replicas()
    assert len(replicas) == 2
    with Asking(served, 6) as asking:
        time.sleep(0.5)
        os.kill(replicas[0].pid, signal.SIGKILL)
        served.wait_for(r"(replica \d) is gone")
        time.sleep(0.5)
    served.wait_for(r"(replica \d) is ready")
    statuses = [response.status_code for response in asking.responses]
    assert set(statuses) <= {200, 503}
    assert statuses.count(503) <= 6  # those of one replica that had begun
    for response in asking.responses:
        body = response.json()
        if response.status_code == 200:
            assert body["choices"][0]["text"] == expected
        else:
            assert "must live until it is complete" in body["error"]["message"]
    assert len(served.replicas()) == 2

    with Asking(served, 6) as asking:
        library.add_adapter(another_adapter("new"), {"tasks": ["new"]})
        library.remove("three")
        served.wait_for(r"(1 adapters come, 1 go)")
        end = time.monotonic() + TIMEOUT_S
        while "lib:new" not in (names := {model["id"] for model in served.client.get("/models").json()["data"]}):
            assert time.monotonic() < end
            time.sleep(0.05)
    assert "lib:three" not in names
    assert {response.status_code for response in asking.responses} == {200}
    assert {response.json()["choices"][0]["text"] for response in asking.responses} == {expected}
    expected = text_of(library, tiny_base_folder, "new", 20)
    for session in "abcd":
        assert served.answer("lib:new", 20, session).json()["choices"][0]["text"] == expected

    with Asking(served, 2) as asking:
        time.sleep(0.3)
        asking.is_over = True
        served.process.send_signal(signal.SIGTERM)
    assert {response.status_code for response in asking.responses} == {200}
    assert served.process.wait(TIMEOUT_S) == 0
    assert [line for line in served.lines if "raylet" in line] == []
