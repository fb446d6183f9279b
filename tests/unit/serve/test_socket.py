"""A real server on a port of its own: asked by OpenAI's client, and by sockets that do what no client does."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from lorary.errors import EngineError
from lorary.serve.run import Listener, reserve, run


class Running:
    """A server in a thread."""

    def __init__(self, asker: Any) -> None:
        self.asker, self.url = asker, ""
        ready = threading.Event()

        def say(address: str) -> None:
            self.url = address
            ready.set()

        self.listener = Listener(asker.app, asker.server, say)
        place = reserve("127.0.0.1", 0)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.listener.serve([place])))
        self._thread.start()
        assert ready.wait(20)

    def stop(self) -> None:
        self.listener.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def send(self, data: bytes, *, wait: float = 0.0, rest: bytes = b"") -> bytes:
        """Bytes over a connection of their own, and what comes back until it is closed."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data)
            if wait:
                time.sleep(wait)
            if rest:
                connection.sendall(rest)
            received = b""
            try:
                while piece := connection.recv(65536):
                    received += piece
            except ConnectionResetError:  # it was closed while we still wrote
                pass
            return received


@pytest.fixture
def start(make_asker: Callable[..., Any]) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def begin(settings: dict[str, Any] | None = None, **engine: Any) -> Running:
        running.append(Running(make_asker(settings, **engine)))
        return running[-1]

    yield begin
    for each in running:
        each.stop()


def post(path: str, body: bytes, *, length: int | None = None, headers: str = "") -> bytes:
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
    return f"{head}{headers}Connection: close\r\n\r\n".encode() + body


def test_the_client_of_openai_is_answered(start: Callable[..., Running]) -> None:
    running = start({"token": "secret"})
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
    assert {"lib", "base", "lib:june"} <= {model.id for model in client.models.list()}
    completion = client.completions.create(
        model="lib", prompt="june", max_tokens=30, logprobs=2, echo=True, seed=1, extra_body={"top_k": 1}
    )
    assert completion.choices[0].text == "june june says: Name the colour of the sky"
    assert completion.choices[0].logprobs is not None
    assert completion.usage is not None
    messages: Any = [{"role": "user", "content": "june?"}]
    chat = client.chat.completions.create(
        model="lib", messages=messages, logprobs=True, top_logprobs=1, extra_body={"trace": True}
    )
    assert chat.choices[0].message.content == "june says: Name the colour of the sky"
    assert chat.model_extra is not None
    assert chat.model_extra["lorary"]["experts"] == [{"name": "june", "weight": 1.0}]
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model="lib", messages=messages, stream=True, stop=["the sky"], n=2, stream_options=options
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["june says: Name the colour of "] * 2
    assert usage is not None
    with pytest.raises(openai.NotFoundError, match="did you mean 'lib'"):
        client.completions.create(model="libb", prompt="a")
    with pytest.raises(openai.BadRequestError, match="positions"):
        client.completions.create(model="lib", prompt="a " * 300)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).models.list()
    raw = client.completions.with_raw_response.create(model="lib", prompt="june")
    assert raw.headers["x-lorary-experts"] == "june=1.000"


def test_what_is_no_request_is_refused_and_the_server_lives(start: Callable[..., Running]) -> None:
    running = start({"body_timeout": 0.3, "max_body": 2000})
    garbage = [
        post("/v1/completions", b"{garbage"),
        post("/v1/completions", b"[" * 1900),
        b"\x16\x03\x01\x02\x00garbage\r\n\r\n",
    ]
    for data in garbage:
        assert running.send(data).startswith(b"HTTP/1.1 400")
    assert running.send(post("/v1/completions", b"x", length=10**12)).startswith(b"HTTP/1.1 413")
    assert running.send(post("/v1/completions", b"", headers=f"X-Long: {'x' * 40_000}\r\n")).startswith(b"HTTP/1.1 400")
    # A body that does not come, and a head that does not.
    assert running.send(post("/v1/completions", b'{"mod', length=100)).startswith(b"HTTP/1.1 408")
    start_time = time.monotonic()
    assert running.send(b"GET /health HTTP/1.1\r\nX-Slow: 1", wait=0.1, rest=b"2") == b""
    assert time.monotonic() - start_time < 5
    assert running.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200"
    )
    assert running.asker.engine.jobs == []


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_is_broken_off_when_its_client_leaves(start: Callable[..., Running], is_streamed: bool) -> None:
    running = start(pace=0.05, text=" blue" * 200)
    engine = running.asker.engine
    body = json.dumps({"model": "lib", "prompt": "june", "max_tokens": 200, "n": 3, "stream": is_streamed}).encode()
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(post("/v1/completions", body))
        if is_streamed:
            assert b"200 OK" in connection.recv(100)
        else:
            wait_until(lambda: engine.running == 3)
    wait_until(lambda: engine.running == 0)
    wait_until(lambda: len(running.asker.server.decisions.last(10)) == 1)
    assert running.asker.server.decisions.last(1)[0]["outcome"] == "broken off"
    assert running.asker.server.traffic.number == 0


def test_a_request_that_was_accepted_is_finished_when_the_server_ends(start: Callable[..., Running]) -> None:
    running = start(pace=0.02)
    received: list[bytes] = []
    body = json.dumps({"model": "lib", "prompt": "june", "max_tokens": 100, "stream": True}).encode()
    asking = threading.Thread(target=lambda: received.append(running.send(post("/v1/completions", body))))
    asking.start()
    wait_until(lambda: running.asker.engine.running == 1)
    running.listener.handle_exit(15, None)
    refused = running.send(post("/v1/completions", body))
    asking.join(20)
    assert received[0].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 503")
    assert b"draining" in refused


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_start_that_fails_says_why(make_asker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asker, addresses = make_asker(), []

    async def start() -> None:
        raise EngineError("the engine must start", found="it did not")

    monkeypatch.setattr(asker.engine, "start", start)
    with pytest.raises(EngineError, match="the engine must start"):
        run(asker.app, asker.server, reserve("127.0.0.1", 0), addresses.append)
    assert addresses == []
