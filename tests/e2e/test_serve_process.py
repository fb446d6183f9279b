"""A server that is told to end while it answers, and one that is killed while its library changes."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from forked_server import ForkedServer
from served import NAMES, PROMPT, another_adapter, make_library, text_of

from lorary.formats.peft import encode_adapter
from lorary.formats.peft_reasons import CONFIG_FILE, WEIGHTS_FILE
from lorary.library.store import Library

ADMIN = {"authorization": "Bearer root"}
NUM_TOKENS = 20


@pytest.fixture
def library(tmp_path: Path, tiny_base_folder: Path) -> Library:
    return make_library(tmp_path / "lib", tiny_base_folder)


@pytest.fixture
def serve(forking_place: str, library: Library) -> Iterator[Callable[..., ForkedServer]]:
    servers: list[ForkedServer] = []

    def begin(*options: str) -> ForkedServer:
        servers.append(ForkedServer(forking_place, library.path, *options))
        return servers[-1]

    yield begin
    for server in servers:
        server.close()


def ask(server: ForkedServer, name: str, num_tokens: int = NUM_TOKENS) -> httpx.Response:
    body = {"model": name, "prompt": PROMPT, "max_tokens": num_tokens}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def put(server: ForkedServer, name: str, files: dict[str, bytes], *, is_new: bool) -> httpx.Response:
    method, path, fields = ("POST", "", {"name": name}) if is_new else ("PUT", f"/{name}", {})
    uploads = {"config": files[CONFIG_FILE], "weights": files[WEIGHTS_FILE]}
    return httpx.request(
        method, f"{server.url}/v1/adapters{path}", data=fields, files=uploads, headers=ADMIN, timeout=120
    )


def test_no_accepted_request_is_lost_when_the_server_is_told_to_end(
    serve: Callable[..., ForkedServer], library: Library, tiny_base_folder: Path
) -> None:
    num_requests, num_tokens = 12, 60
    server = serve("--batch", "2", "--drain", "100")
    answers: list[tuple[str, Any]] = []

    def whole(name: str) -> None:
        answers.append((name, text(ask(server, f"lib:{name}", num_tokens))))

    def streamed(name: str) -> None:
        body = {"model": f"lib:{name}", "prompt": PROMPT, "max_tokens": num_tokens, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        answers.append((name, None))

    threads = [
        threading.Thread(target=(whole, streamed)[i % 2], args=(NAMES[i % len(NAMES)],)) for i in range(num_requests)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while f"lorary_requests_under_way {num_requests}.0" not in httpx.get(f"{server.url}/metrics", timeout=120).text:
        assert time.monotonic() < end, "the requests were answered too quickly, or did not come"
    server.signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    code, errors = server.end()
    assert (code, errors.count("error")) == (0, 0), errors
    assert len(answers) == num_requests
    expected = {name: text_of(library, tiny_base_folder, name, num_tokens) for name in NAMES}
    assert [answer for name, answer in answers if answer not in (None, expected[name])] == []


def test_a_change_that_was_acknowledged_outlives_a_kill(
    serve: Callable[..., ForkedServer], library: Library, tiny_base_folder: Path
) -> None:
    server = serve()
    assert put(server, "new", encode_adapter(another_adapter("new")), is_new=True).status_code == 201
    server.signal(signal.SIGKILL)
    assert server.end()[0] == -signal.SIGKILL
    assert library.verify() == []
    again = serve()
    assert text(ask(again, "lib:new")) == text_of(library, tiny_base_folder, "new", NUM_TOKENS)
    assert text(ask(again, "lib:june")) == text_of(library, tiny_base_folder, "june", NUM_TOKENS)


def test_a_kill_within_a_change_leaves_the_old_library_or_the_new_one(
    serve: Callable[..., ForkedServer], library: Library, tiny_base_folder: Path
) -> None:
    names = set(NAMES)
    for number, delay in enumerate((0.02, 0.06, 0.15)):
        server, name = serve(), f"new-{number}"
        files, before = encode_adapter(another_adapter(name, seed=number)), weights_of(library, "june")
        changing = [
            threading.Thread(target=until_killed, args=(server, "june", files), kwargs={"is_new": False}),
            threading.Thread(target=until_killed, args=(server, name, files), kwargs={"is_new": True}),
        ]
        for thread in changing:
            thread.start()
        time.sleep(delay)
        server.signal(signal.SIGKILL)
        for thread in changing:
            thread.join()
        assert server.end()[0] == -signal.SIGKILL
        assert library.verify() == []
        assert weights_of(library, "june") in (before, sha256(files[WEIGHTS_FILE]).hexdigest())
        assert names <= set(library.names()) <= {*names, name}
        names = set(library.names())
    served = serve()
    for name in names:
        assert text(ask(served, f"lib:{name}")) == text_of(library, tiny_base_folder, name, NUM_TOKENS)


def weights_of(library: Library, name: str) -> str:
    return str(library.provenance(name)["files"][WEIGHTS_FILE])


def until_killed(server: ForkedServer, name: str, files: dict[str, bytes], *, is_new: bool) -> None:
    with suppress(httpx.HTTPError):  # its server is gone
        put(server, name, files, is_new=is_new)
