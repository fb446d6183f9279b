"""A server that decides and lets another one answer."""

import asyncio
import json
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import FakeEngine
from fake_upstream import STREAM, FakeUpstream, LiveTransport, Script
from tests.conftest import TINY_VOCABULARY

from lorary.errors import UsageError
from lorary.library.store import Library
from lorary.serve.app import create_app
from lorary.serve.gateway import Gateway
from lorary.serve.prompts import Prompts
from lorary.serve.server import Server
from lorary.serve.settings import ServeSettings
from lorary.serve.upstream import Upstream
from lorary.serve.upstream_settings import UpstreamSettings

NAMES = ["blue", "june", "three"]


class Front:
    """A gateway before a fake server, and a client of it."""

    def __init__(self, library: Library, tokenizer: Any, behind: FakeUpstream, **settings: Any) -> None:
        self.settings = UpstreamSettings(**{"url": "http://127.0.0.1:1/v1/", "token": behind.token, **settings})
        self.behind, self.engine = behind, FakeEngine(tokenizer, list(library.names()))
        prompts = Prompts(library, tokenizer, context=256, num_tokens=TINY_VOCABULARY, most=None)
        self.server = Server(self.engine, library, prompts, ServeSettings())

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        """Do something with a client of the server, started anew."""
        gateway = Gateway(self.server, Upstream(self.settings, LiveTransport(self.behind)))
        app = create_app(self.server, gateway=gateway)
        self.server.traffic.is_draining = False

        async def main() -> Any:
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=LiveTransport(app), base_url="http://127.0.0.1") as client,
            ):
                return await asyncio.wait_for(work(client), 30)

        return asyncio.run(main())

    def post(self, path: str = "/v1/completions", headers: Any = None, **body: Any) -> httpx.Response:
        response: httpx.Response = self.run(lambda client: client.post(path, json=body, headers=headers))
        return response


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorary.serve.upstream._FIRST_PAUSE", 0.0)


@pytest.fixture
def make_front(library: Library, chat_tokenizer: Any) -> Callable[..., Front]:
    def make(behind: FakeUpstream | None = None, **settings: Any) -> Front:
        return Front(library, chat_tokenizer, behind or FakeUpstream.of_vllm(NAMES), **settings)

    return make


@pytest.fixture
def front(make_front: Callable[..., Front]) -> Front:
    return make_front()


def message_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


# Who is asked.


def test_the_expert_that_is_decided_is_asked_by_its_name(front: Front) -> None:
    response = front.post(model="lib", prompt="june? ", max_tokens=5, top_k=1, trace=False, seed=3)
    assert response.json() == {"choices": [{"text": "june says so"}]}
    # What is ours is not passed on: another server's top_k counts tokens.
    assert front.behind.answered == [{"model": "june", "prompt": "june? ", "max_tokens": 5, "seed": 3}]
    assert response.headers["x-lorary-experts"] == "june=1.000"
    assert response.headers["x-lorary-router"] == "auto"


@pytest.mark.parametrize(("model", "asked"), [("lib:blue", "blue"), ("base", "tiny"), ("lib", "three")])
def test_names_lead_to_experts_and_to_the_base(front: Front, model: str, asked: str) -> None:
    front.post(model=model, prompt="say three")
    assert front.behind.answered[0]["model"] == asked


def test_where_no_expert_fits_the_base_is_asked_in_its_own_template(front: Front) -> None:
    response = front.post(model="lib", prompt="nothing")
    (asked,) = front.behind.answered
    assert asked["model"] == "tiny"
    assert front.engine.tokenizer.decode(asked["prompt"]) == "<user>nothing<assistant>"
    assert response.headers["x-lorary-experts"] == ""


def test_a_fallback_on_the_mean_of_all_experts_is_the_base(front: Front) -> None:
    front.post("/v1/chat/completions", model="lib", messages=[{"role": "user", "content": "nothing"}])
    assert front.behind.answered[0]["model"] == "tiny"
    (entry,) = front.server.decisions.last(9)
    assert "the base answers, since the server behind takes one adapter" in entry["sentence"]
    assert (entry["experts"], entry["outcome"]) == ([], "ok")


def test_a_conversation_is_passed_on_as_it_is_and_decided_by_what_the_server_behind_reads(front: Front) -> None:
    messages = [{"role": "user", "content": "which june?"}]
    front.post("/v1/chat/completions", model="lib", messages=messages, stream=False)
    assert front.behind.answered == [{"model": "june", "messages": messages, "stream": False}]
    assert front.engine.tokenizer.decode(list(front.engine.decided[0])) == "<user>which june?<assistant>"
    refused = front.post("/v1/chat/completions", model="lib", messages=messages, template="plain")
    assert (refused.status_code, "chat template" in message_of(refused)) == (400, True)


def test_a_prompt_in_another_template_is_passed_on_as_ids(front: Front) -> None:
    front.post(model="lib:blue", prompt="hi", template="chat")
    assert front.engine.tokenizer.decode(front.behind.answered[0]["prompt"]) == "<user>hi<assistant>"
    front.post(model="lib:blue", prompt=[5, 6, 7])
    assert front.behind.answered[1]["prompt"] == [5, 6, 7]


def test_prompts_of_one_request_go_to_one_adapter_or_are_refused(front: Front) -> None:
    front.post(model="lib", prompt=["june a", "june b"])
    assert front.behind.answered == [{"model": "june", "prompt": ["june a", "june b"]}]
    refused = front.post(model="lib", prompt=["june", "blue"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "several_experts")
    assert "blue, june" in message_of(refused)
    assert len(front.behind.answered) == 1


def test_of_several_experts_the_best_answers_or_none_where_that_is_asked_for(
    make_front: Callable[..., Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorary.evaluate.decisions import Decision

    both = Decision((("blue", 0.4), ("june", 0.6)), "june", 1.0, False, "contrast")
    monkeypatch.setattr(FakeEngine, "_decision", lambda *_: both)
    front = make_front()
    response = front.post(model="lib", prompt="x", top_k=2)
    assert response.json()["choices"][0]["text"] == "june says so"
    assert response.headers["x-lorary-experts"] == "june=1.000"
    (entry,) = front.server.decisions.last(9)
    assert "june answers alone" in entry["sentence"]
    strict = make_front(strict=True)
    refused = strict.post(model="lib", prompt="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "several_experts")
    assert not strict.behind.answered


def test_a_router_that_decides_per_token_is_refused(front: Front) -> None:
    refused = front.post(model="lib", prompt="x", router="arrow")
    assert refused.status_code == 400
    assert "decides per layer" in message_of(refused)
    assert "lorary export --for vllm" in message_of(refused)
    assert not front.behind.answered


def test_the_mean_of_all_experts_has_no_best_one(front: Front) -> None:
    refused = front.post(model="lib@uniform", prompt="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "several_experts")
    assert "blue 33%, june 33%, three 33%" in message_of(refused)


# Servers of other kinds.


def test_sglang_is_asked_by_base_and_adapter(make_front: Callable[..., Front]) -> None:
    models = [{"id": "tiny", "owned_by": "sglang", "parent": None}]
    models += [{"id": name, "owned_by": "sglang", "parent": "tiny"} for name in NAMES]
    front = make_front(FakeUpstream(models))
    front.post(model="lib", prompt="june")
    front.post(model="base", prompt="june")
    assert [body["model"] for body in front.behind.answered] == ["tiny:june", "tiny"]


def test_llama_cpp_is_asked_by_numbers_of_adapters(make_front: Callable[..., Front]) -> None:
    adapters = [{"id": i, "path": f"/somewhere/{name}.gguf", "scale": 1.0} for i, name in enumerate(NAMES)]
    front = make_front(FakeUpstream([{"id": "tiny.gguf", "owned_by": "llamacpp"}], lora_adapters=adapters))
    front.post(model="lib", prompt="june")
    front.post(model="base", prompt="june")
    assert [body["lora"] for body in front.behind.answered] == [[{"id": 1, "scale": 1.0}], []]
    behind = FakeUpstream([{"id": "tiny.gguf", "owned_by": "llamacpp"}], lora_adapters=adapters[:1])
    short = make_front(behind, load=True)
    with pytest.raises(UsageError, match="only when it starts"):
        short.post(model="lib", prompt="june")


# What it holds.


def test_adapters_that_are_not_there_are_named_at_the_start(make_front: Callable[..., Front]) -> None:
    with pytest.raises(UsageError, match=r"1 are not there: three; it holds blue, june\n.*--upstream-load"):
        make_front(FakeUpstream.of_vllm(["blue", "june"])).post(model="lib", prompt="june")
    front = make_front(FakeUpstream.of_vllm([f"team-{name}" for name in NAMES]), adapter_prefix="team-")
    front.post(model="lib", prompt="june")
    assert front.behind.answered[0]["model"] == "team-june"


def test_adapters_are_loaded_under_names_that_hold_their_content(
    make_front: Callable[..., Front], library: Library
) -> None:
    front = make_front(FakeUpstream.of_vllm([]), load=True)
    front.post(model="lib", prompt="june")
    digest = library.provenance("june")["content_hash"][:8]
    loaded = {body["lora_name"]: body["lora_path"] for path, body, _ in front.behind.asked if "load_lora" in path}
    assert len(loaded) == 3
    assert Path(loaded[f"june-{digest}"]) == (library.path / "adapters" / "june").resolve()
    assert front.behind.answered[0]["model"] == f"june-{digest}"
    # They are there now: nothing is loaded twice.
    again = make_front(front.behind, load=True)
    again.post(model="lib", prompt="june")
    assert len([path for path, _, _ in front.behind.asked if "load_lora" in path]) == 3


def test_a_server_that_was_started_anew_loads_again(make_front: Callable[..., Front]) -> None:
    front = make_front(FakeUpstream.of_vllm([]), load=True)

    async def work(client: httpx.AsyncClient) -> httpx.Response:
        del front.behind.models[1:]
        front.behind.script.append(Script(404, [b"{}"]))
        return await client.post("/v1/completions", json={"model": "lib", "prompt": "june"})

    assert front.run(work).json()["choices"][0]["text"].startswith("june-")
    loaded = [body["lora_name"] for path, body, _ in front.behind.asked if "load_lora" in path]
    assert len(loaded) == 4
    assert loaded[-1] == front.behind.answered[-1]["model"]


def test_an_adapter_that_was_replaced_here_is_not_asked_for_under_its_old_name(
    make_front: Callable[..., Front], lent_library: Path, tmp_path: Path, chat_tokenizer: Any
) -> None:
    shutil.copytree(lent_library, tmp_path / "lib")
    library = Library.open(tmp_path / "lib")
    body = {"model": "lib", "prompt": "june"}

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        before = await client.post("/v1/completions", json=body)
        library.replace(library.path / "adapters" / "blue", "june")
        return [before, await client.post("/v1/completions", json=body)]

    before, refused = Front(library, chat_tokenizer, FakeUpstream.of_vllm(NAMES)).run(work)
    assert (before.status_code, refused.status_code) == (200, 502)
    assert "was replaced since the start" in message_of(refused)
    loading = Front(library, chat_tokenizer, FakeUpstream.of_vllm([]), load=True)
    library.replace(lent_library / "adapters" / "june", "june")
    before, after = loading.run(work)
    names = [body["model"] for body in loading.behind.answered]
    assert (before.status_code, after.status_code, names[0] == names[1]) == (200, 200, False)


def test_requests_at_the_same_time_load_an_adapter_once(make_front: Callable[..., Front]) -> None:
    front = make_front(FakeUpstream.of_vllm([]), load=True)

    async def work(client: httpx.AsyncClient) -> None:
        front.behind.models[:] = [model for model in front.behind.models if not model["id"].startswith("june")]
        front.behind.script.extend([Script(404, [b"{}"])] * 5)
        body = {"model": "lib", "prompt": "june"}
        replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(5)))
        assert [reply.status_code for reply in replies] == [200] * 5

    front.run(work)
    loaded = [body["lora_name"] for path, body, _ in front.behind.asked if "load_lora" in path]
    assert sum(name.startswith("june") for name in loaded) == 2


def test_a_server_that_loads_nothing_says_how_it_would(make_front: Callable[..., Front]) -> None:
    with pytest.raises(UsageError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        make_front(FakeUpstream.of_vllm([], can_load=False), load=True).post(model="lib", prompt="june")


def test_our_token_is_sent_and_the_clients_is_not(make_front: Callable[..., Front]) -> None:
    front = make_front(FakeUpstream.of_vllm(NAMES, token="secret"))
    front.post(headers={"authorization": "Bearer mine", "x-session-id": "s"}, model="lib", prompt="june")
    headers = front.behind.asked[-1][2]
    assert headers["authorization"] == "Bearer secret"
    assert headers["x-session-id"] == "s"
    assert "mine" not in str(headers)
    with pytest.raises(UsageError, match="--upstream-token"):
        make_front(FakeUpstream.of_vllm(NAMES, token="secret"), token="other").post(model="lib", prompt="june")


def test_a_server_that_is_none_is_named(make_front: Callable[..., Front]) -> None:
    with pytest.raises(UsageError, match="speaks OpenAI"):
        make_front(FakeUpstream([])).post(model="lib", prompt="x")
    for url in ("", "127.0.0.1:8001", "ftp://127.0.0.1"):
        with pytest.raises(UsageError, match="--upstream"):
            UpstreamSettings(url=url)
    with pytest.raises(UsageError, match="--upstream-kind"):
        UpstreamSettings(url="http://127.0.0.1:1", kind="tgi")


# Answers and errors.


def test_a_stream_is_passed_on_byte_for_byte_as_it_comes(front: Front) -> None:
    pieces = [b'data: {"choices":[{"te', b'xt":"\xc3', b'\xa4"}]}\n\n: ping\n\n', b"data: [DONE]\n\n"]
    front.behind.script.append(Script(pieces=pieces, headers=STREAM, pace=0.01))

    async def work(client: httpx.AsyncClient) -> list[bytes]:
        body = {"model": "lib", "prompt": "june", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["content-type"] == STREAM["content-type"]
            assert response.headers["x-lorary-experts"] == "june=1.000"
            return [piece async for piece in response.aiter_raw() if piece]

    assert front.run(work) == pieces
    (entry,) = front.server.decisions.last(9)
    assert (entry["outcome"], entry["experts"]) == ("ok", [{"name": "june", "weight": 1.0}])


def test_the_receipt_goes_along_where_it_is_asked_for(front: Front) -> None:
    body = front.post(model="lib", prompt="june", trace=True).json()
    assert body["choices"] == [{"text": "june says so"}]
    assert body["lorary"]["experts"] == [{"name": "june", "weight": 1.0}]
    front.behind.script.append(Script(pieces=[b"data: 1\n\n", b"data: [DONE]\n\n"], headers=STREAM))
    first, *rest = front.post(model="lib", prompt="june", trace=True, stream=True).content.split(b"\n\n")
    assert json.loads(first.removeprefix(b"data: "))["lorary"]["router"] == "auto"
    assert rest == [b"data: 1", b"data: [DONE]", b""]


def test_who_leaves_a_stream_breaks_it_off_behind(front: Front) -> None:
    pieces = [b"data: %d\n\n" % number for number in range(1000)]
    front.behind.script.append(Script(pieces=pieces, headers=STREAM, pace=0.01))

    async def work(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/completions", json={"model": "lib", "prompt": "june"}) as response:
            async for _ in response.aiter_raw():
                break

    front.run(work)
    assert front.behind.num_left == 1
    assert front.behind.num_sent < 100
    assert front.server.decisions.last(1)[0]["outcome"] == "broken off"


def test_who_leaves_before_the_first_byte_breaks_it_off_behind(front: Front) -> None:
    front.behind.script.append(Script(waits=20.0))

    async def work(client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json={"model": "lib", "prompt": "june"}))
        while not front.behind.answered:
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    front.run(work)
    assert front.behind.num_left == 1


def test_a_stream_that_breaks_off_ends_with_an_error(front: Front) -> None:
    pieces = [b"data: 1\n\n", b"data: {"]
    front.behind.script.append(Script(pieces=pieces, headers=STREAM, error=httpx.ReadError("gone")))
    events = front.post(model="lib", prompt="june", stream=True).content.split(b"\n\n")
    assert events[0] == b"data: 1"
    error = json.loads(events[2].removeprefix(b"data: "))["error"]
    assert error["code"] == "upstream_broken"
    assert "broke off" in error["message"]
    assert b"[DONE]" not in b"".join(events)
    assert front.server.decisions.last(1)[0]["outcome"] == "upstream_broken"


def test_an_answer_that_breaks_off_is_an_error(front: Front) -> None:
    front.behind.script.append(Script(pieces=[b'{"choi'], error=httpx.ReadError("gone")))
    response = front.post(model="lib", prompt="june")
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_broken")


def test_a_server_that_comes_back_is_asked_again_before_the_first_byte(front: Front) -> None:
    front.behind.script.extend([httpx.ConnectError("refused"), Script(503, [b"starting"])])
    assert front.post(model="lib", prompt="june").json()["choices"][0]["text"] == "june says so"
    assert len(front.behind.answered) == 3


@pytest.mark.parametrize(
    ("reply", "status", "code", "said"),
    [
        (Script(429, [b'{"error": {"message": "full"}}'], {"retry-after": "7"}), 429, "upstream_busy", "full"),
        (Script(500, [b'{"error": "CUDA out of memory"}']), 502, "upstream_error", "500: CUDA out of memory"),
        (Script(500, [b""]), 502, "upstream_error", "no reason given"),
        (Script(401, [b"{}"]), 502, "upstream_token", "does not take our token"),
        (Script(404, [b'{"error": {"message": "gone"}}']), 502, "upstream_error", "404 for june"),
        (httpx.ReadTimeout("slow"), 504, "upstream_timeout", "ReadTimeout"),
    ],
)
def test_errors_behind_are_told_by_name_and_not_tried_again(
    front: Front, reply: Any, status: int, code: str, said: str
) -> None:
    front.behind.script.append(reply)
    response = front.post(model="lib", prompt="june")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert said in message_of(response)
    assert "http://127.0.0.1:1" in message_of(response)
    assert len(front.behind.answered) == 1
    if status == 429:
        assert response.headers["retry-after"] == "7"


def test_what_stays_away_is_told_after_the_last_try(front: Front) -> None:
    front.behind.script.extend([httpx.ConnectError("refused")] * 3)
    response = front.post(model="lib", prompt="june")
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_unreachable")
    front.behind.script.extend([Script(503, [b"draining"], {"retry-after": "3"})] * 3)
    response = front.post(model="lib", prompt="june")
    assert (response.status_code, response.headers["retry-after"]) == (503, "3")
    assert len(front.behind.answered) == 6


def test_what_the_server_behind_refuses_of_a_request_is_its_own_word(front: Front) -> None:
    said = b'{"object":"error","message":"max_tokens is too large"}'
    front.behind.script.append(Script(400, [said]))
    response = front.post(model="lib", prompt="june", max_tokens=10**6)
    assert (response.status_code, response.content) == (400, said)
    assert front.server.decisions.last(1)[0]["outcome"] == "status 400"


def test_a_dry_run_asks_nobody(front: Front) -> None:
    body = front.post("/v1/route", model="lib", prompt="june").json()
    assert body["experts"] == [{"name": "june", "weight": 1.0}]
    front.post("/v1/route", model="lib", messages=[{"role": "user", "content": "june"}])
    # By what a request would be decided by.
    assert front.engine.tokenizer.decode(list(front.engine.decided[-1])) == "<user>june<assistant>"
    assert not front.behind.answered
