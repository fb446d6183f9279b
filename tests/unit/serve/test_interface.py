"""Names, routing fields, errors, decisions, tokens and bounds."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorary.errors import UsageError
from lorary.serve.app import create_app
from lorary.serve.decision_log import read_log
from lorary.serve.page import page_response
from lorary.serve.settings import ServeSettings


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body: dict[str, Any] = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def test_models_are_the_library_its_routers_its_experts_and_the_base(asker: Any) -> None:
    models = {model["id"]: model for model in asker.ask("GET", "/v1/models").json()["data"]}
    assert {"lib", "base", "lib@auto", "lib@arrow", "lib@uniform", "lib:blue", "lib:june", "lib:three"} <= set(models)
    # It needs data that nobody prepared.
    assert "lib@centroid" not in models
    assert "library prepare" in error(asker.post("/v1/completions", model="lib@centroid", prompt="a"), 404)["message"]
    assert (models["lib:blue"]["parent"], models["lib"]["parent"], models["base"]["parent"]) == ("lib", "base", None)
    assert all(model["owned_by"] == "lorary" for model in models.values())
    assert asker.ask("GET", "/v1/models/lib:blue").json() == models["lib:blue"]
    error(asker.ask("GET", "/v1/models/none"), 404)


def test_a_wrong_name_is_answered_with_the_valid_ones(asker: Any) -> None:
    body = error(asker.post("/v1/completions", model="lib:blu", prompt="a"), 404)
    assert "did you mean 'lib:blue'?" in body["message"]
    assert "lib@arrow" in body["message"]
    assert (body["param"], body["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"router": "arow"}, 400, "did you mean 'arrow'"),
        ({"router": "centroid"}, 400, "prepared"),
        ({"top_k": 0}, 400, "top_k"),
        ({"top_k": "2"}, 400, "top_k"),
        ({"temperature_routing": 0.0}, 400, "temperature"),
        ({"allow": []}, 400, "allow"),
        ({"allow": ["nobody"]}, 400, "allow must name experts"),
        ({"per": "week"}, 400, "per"),
        ({"model": "lib:blue", "top_k": 2}, 400, "decides nothing"),
        ({"template": "french"}, 400, "template"),
        ({"prompt": ""}, 400, "must hold text"),
        ({"prompt": []}, 400, "must hold a token"),
        ({"prompt": [999]}, 400, "below 300"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "Unicode"),
        ({"prompt": "a " * 300}, 400, "256 positions"),
        ({"max_tokens": 5000}, 400, "max_tokens may be 1024"),
        ({"max_tokens": 0}, 400, "echo"),
        ({"max_tokens": 255}, 400, "256 positions"),
        ({"n": 65}, 400, "64 answers"),
        ({"n": True}, 400, "n"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": 1e-9}, 400, "temperature"),
        ({"stop": ""}, 400, "stop"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"best_of": 3}, 400, "best_of"),
    ],
)
def test_bad_input_is_refused_with_its_name(asker: Any, changes: dict[str, Any], status: int, said: str) -> None:
    data = json.dumps({"model": "lib", "prompt": "june", **changes})
    response = asker.ask("POST", "/v1/completions", content=data, headers={"content-type": "application/json"})
    assert said in error(response, status)["message"]
    assert asker.engine.jobs == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ],
)
def test_what_a_reply_cannot_do_is_refused(asker: Any, changes: dict[str, Any], said: str) -> None:
    messages = [{"role": "user", "content": "june"}]
    assert (
        said
        in error(asker.post("/v1/chat/completions", **{"model": "lib", "messages": messages, **changes}), 400)[
            "message"
        ]
    )


def test_fields_that_nobody_knows_and_neutral_ones_are_ignored(asker: Any) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "ju"}, {"type": "text", "text": "ne"}], "name": "x"}
    ]
    extra = {"user": "me", "store": False, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}}
    assert asker.post("/v1/chat/completions", model="lib", messages=messages, **extra).status_code == 200


def test_routing_fields_change_who_answers(asker: Any) -> None:
    asker.post("/v1/completions", model="lib", prompt="june", router="uniform")
    asker.post("/v1/completions", model="lib@arrow", prompt="june", top_k=2, temperature_routing=0.5, per="token")
    asker.post("/v1/completions", model="lib", prompt="june", allow=["blue", "three"], threshold=-5.0)
    uniform, arrow, allowed = [job.setting for job in asker.engine.jobs]
    assert uniform.router == "uniform"
    assert (arrow.router, arrow.choosing.top_k, arrow.choosing.temperature, arrow.per) == ("arrow", 2, 0.5, "token")
    assert allowed.fixed == {"blue": 1.0}


def test_a_dry_run_tells_who_would_answer_and_who_would_not(asker: Any) -> None:
    response = asker.post("/v1/route", model="lib", prompt="june")
    body = response.json()
    assert (body["router"], body["rule"], body["is_fallback"]) == ("auto", "contrast", False)
    assert (body["confidence"], body["threshold"]) == (2.0, 0.0)
    assert body["experts"] == [{"name": "june", "weight": 1.0}]
    assert body["rejected"] == [{"name": "blue", "score": -1.0}, {"name": "three", "score": -1.0}]
    assert body["sentence"].startswith("auto, by contrast: june 100%")
    assert body["num_tokens"] > 0
    assert "tokens" not in body or body["tokens"] is None
    assert asker.engine.jobs == []
    assert response.headers["x-request-id"] == body["id"]


def test_a_dry_run_of_a_rule_for_tokens_looks_at_them(asker: Any) -> None:
    body = asker.post("/v1/route", model="lib@arrow", prompt="june", trace=True).json()
    assert (body["router"], body["confidence"]) == ("arrow", None)
    assert body["experts"] == [{"name": "blue", "weight": 0.5}, {"name": "three", "weight": 0.25}]
    assert body["rejected"] == [{"name": "june", "score": 0.0}]
    assert "".join(token["text"] for token in body["tokens"]) == "june"
    assert body["tokens"][0]["experts"] == [{"name": "blue", "weight": 0.5}, {"name": "three", "weight": 0.25}]
    assert [layer["group"] for layer in body["layers"]] == ["layer 0", "layer 1"]
    assert body["layers"][1]["experts"] == [{"name": "three", "weight": 0.5}]


def test_a_dry_run_takes_a_prompt_or_messages(asker: Any) -> None:
    messages = [{"role": "user", "content": "june"}]
    assert asker.post("/v1/route", model="lib", messages=messages).json()["experts"][0]["name"] == "june"
    error(asker.post("/v1/route", model="lib", messages=messages, prompt="june"), 400)
    error(asker.post("/v1/route", model="lib"), 400)


def test_decisions_are_shown_again_and_counted(asker: Any) -> None:
    async def work(client: httpx.AsyncClient) -> tuple[Any, ...]:
        first = await client.post("/v1/completions", json={"model": "lib", "prompt": "june"})
        await client.post("/v1/completions", json={"model": "lib", "prompt": "nobody"})
        await client.post("/v1/route", json={"model": "lib", "prompt": "three"})
        again = await client.get(f"/v1/decisions/{first.headers['x-request-id']}")
        last = await client.get("/v1/decisions", params={"limit": 2})
        return again.json(), last.json()["data"], (await client.get("/v1/usage")).json()

    again, last, usage = asker.run(work)
    assert (again["experts"], again["outcome"], again["finish"]) == (
        [{"name": "june", "weight": 1.0}],
        "ok",
        ["length"],
    )
    assert "prompt" not in again
    assert [entry["endpoint"] for entry in last] == ["route", "completions"]
    assert usage == {"requests": 2, "fallback": 1, "experts": {"june": 1}, "shadow": None}
    error(asker.ask("GET", "/v1/decisions/none"), 404)
    error(asker.ask("GET", "/v1/decisions", params={"limit": 0}), 400)


def test_a_session_keeps_its_first_decision(asker: Any) -> None:
    async def work(client: httpx.AsyncClient) -> list[str]:
        named = []
        for session, prompt in (("s", "june"), ("s", "blue"), ("t", "blue"), (None, "three")):
            headers = {"x-session-id": session} if session else {}
            response = await client.post("/v1/completions", json={"model": "lib", "prompt": prompt}, headers=headers)
            named.append(response.headers["x-lorary-experts"])
        return named

    assert asker.run(work) == ["june=1.000", "june=1.000", "blue=1.000", "three=1.000"]
    assert len(asker.engine.decided) == 3
    error(
        asker.ask("POST", "/v1/completions", json={"model": "lib", "prompt": "a"}, headers={"x-session-id": "x" * 300}),
        400,
    )


def test_a_shadow_router_decides_beside_and_the_two_are_compared(make_asker: Any, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    asker = make_asker({"shadow": "arrow", "shadow_share": 1.0, "log": str(log)})

    async def work(client: httpx.AsyncClient) -> Any:
        for prompt in ("june", "blue"):
            await client.post("/v1/completions", json={"model": "lib", "prompt": prompt})
            await asyncio.sleep(0.01)
        return (await client.get("/v1/usage")).json(), (await client.get("/v1/decisions")).json()["data"]

    usage, decisions = asker.run(work)
    # The fake traces blue as the strongest of every text.
    assert usage["shadow"] == {"router": "arrow", "requests": 2, "agree": 1}
    assert usage["requests"] == 2
    assert decisions[0]["shadow"] == {"router": "arrow", "winner": "blue", "agrees": True}
    kinds = [entry["kind"] for entry in read_log(log)]
    assert sorted(kinds) == ["decision", "decision", "shadow", "shadow"]


def test_the_log_holds_prompts_only_where_asked_and_redacted(make_asker: Any, tmp_path: Path) -> None:
    bare, full = tmp_path / "bare.jsonl", tmp_path / "full.jsonl"
    make_asker({"log": str(bare)}).post("/v1/completions", model="lib", prompt="june 4711 secret")
    settings = {"log": str(full), "log_prompts": True, "redact": (r"\d{4}", "sec.et")}
    make_asker(settings).post("/v1/completions", model="lib", prompt="june 4711 secret")
    assert "secret" not in bare.read_text()
    (entry,) = read_log(full)
    assert entry["prompt"] == "june [redacted] [redacted]"
    assert (full.stat().st_mode & 0o777) == 0o600


def test_a_pattern_that_never_ends_stores_nothing(make_asker: Any, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    asker = make_asker({"log": str(log), "log_prompts": True, "redact": ("(?:a|aa|aaa)+$",)})
    asker.post("/v1/completions", model="base", prompt="a" * 100 + "b")
    (entry,) = read_log(log)
    assert entry["prompt"] == "[not stored: a pattern took too long]"


def test_a_log_that_was_cut_off_is_read_up_to_there_and_gone_on_with(make_asker: Any, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    make_asker({"log": str(log)}).post("/v1/completions", model="lib", prompt="june")
    log.write_bytes(log.read_bytes() + b'{"kind":"deci')
    make_asker({"log": str(log)}).post("/v1/completions", model="lib", prompt="blue")
    with pytest.warns(UserWarning, match="line 2 .* is not whole"):
        entries = list(read_log(log))
    assert [entry["experts"][0]["name"] for entry in entries] == ["june", "blue"]
    log.write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="must be a decision"):
        list(read_log(log))


def test_a_token_is_asked_for_everywhere_but_at_the_signs_of_life(make_asker: Any) -> None:
    asker = make_asker({"token": "secret", "admin_token": "root"})
    body = {"model": "lib", "prompt": "june"}
    for path in ("/health", "/ready"):
        assert asker.ask("GET", path).status_code == 200
    for path in ("/", "/v1/models", "/metrics", "/openapi.json", "/v1/decisions", "/nowhere"):
        response = asker.ask("GET", path)
        assert error(response, 401)["code"] == "invalid_api_key"
        assert "www-authenticate" in response.headers
    for given in ("", "Bearer wrong", "Bearer secretx", "secret2", "Bearer s\xe9cret"):
        headers = {"authorization": given.encode("latin-1")}
        error(asker.ask("POST", "/v1/completions", json=body, headers=headers), 401)
    for given in ("Bearer secret", "Bearer root"):
        assert asker.ask("POST", "/v1/completions", json=body, headers={"authorization": given}).status_code == 200
    error(asker.ask("DELETE", "/v1/adapters/blue", headers={"authorization": "Bearer secret"}), 403)
    # A browser asks for a password when it opens the page, and sends it with all that the page asks for.
    assert asker.ask("GET", "/").headers["www-authenticate"].startswith("Basic")
    assert asker.ask("GET", "/v1/models", auth=("anyone", "secret")).status_code == 200
    error(asker.ask("GET", "/v1/models", auth=("anyone", "wrong")), 401)
    error(asker.ask("GET", "/v1/models", headers={"authorization": "Basic ?"}), 401)
    error(asker.ask("DELETE", "/v1/adapters/blue", auth=("anyone", "root")), 401)


def test_a_page_of_another_site_asks_for_nothing(asker: Any) -> None:
    body, headers = {"model": "lib", "prompt": "june"}, {"sec-fetch-site": "cross-site"}
    error(asker.ask("POST", "/v1/completions", json=body, headers=headers), 403)
    headers = {"sec-fetch-site": "same-origin"}
    assert asker.ask("POST", "/v1/completions", json=body, headers=headers).status_code == 200


def test_the_library_is_not_changed_without_an_admin_token(asker: Any) -> None:
    body = error(asker.ask("DELETE", "/v1/adapters/blue"), 403)
    assert "--admin-token" in body["message"]
    assert "blue" in asker.engine.names


def test_a_name_that_a_page_of_another_site_gave_this_machine_is_refused(asker: Any) -> None:
    error(asker.ask("GET", "/v1/models", headers={"host": "evil.example:8000"}), 421)
    assert asker.ask("GET", "/v1/models", headers={"host": "localhost:8000"}).status_code == 200
    assert asker.ask("GET", "/v1/models", headers={"host": "[::1]:8000"}).status_code == 200


def test_bodies_are_bounded(make_asker: Any) -> None:
    asker = make_asker({"max_body": 2000})
    json_type = {"content-type": "application/json"}

    async def chunks() -> Any:
        for _ in range(30):
            yield b"x" * 100

    error(asker.ask("POST", "/v1/completions", content=b"x" * 3000, headers=json_type), 413)
    error(asker.ask("POST", "/v1/completions", content=chunks(), headers=json_type), 413)
    for garbage in (b"{", b"[" * 1500, b"\xff\xfe", b"nul", b'{"model": NaN}', b"[]", b""):
        error(asker.ask("POST", "/v1/completions", content=garbage, headers=json_type), 400)
    # A form of another site can send this type without asking.
    error(
        asker.ask(
            "POST",
            "/v1/completions",
            content=b'{"model": "lib", "prompt": "a"}',
            headers={"content-type": "text/plain"},
        ),
        400,
    )
    error(asker.ask("GET", "/v1/completions"), 405)
    error(asker.ask("GET", "/../../etc/passwd"), 404)


def test_prompts_are_bounded_where_asked(make_asker: Any) -> None:
    asker = make_asker({"max_prompt_tokens": 3})
    assert "3 tokens" in error(asker.post("/v1/completions", model="base", prompt=[5, 6, 7, 8]), 400)["message"]


def test_a_server_that_is_full_says_when_to_ask_again(make_asker: Any) -> None:
    asker = make_asker({"max_requests": 2}, pace=0.02)

    async def work(client: httpx.AsyncClient) -> list[httpx.Response]:
        body = {"model": "base", "prompt": "a"}
        return await asyncio.gather(*[client.post("/v1/completions", json=body) for _ in range(4)])

    responses = asker.run(work)
    assert sorted(response.status_code for response in responses) == [200, 200, 429, 429]
    busy = next(response for response in responses if response.status_code == 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert error(busy, 429)["type"] == "rate_limit_error"


def test_a_full_engine_breaks_off_what_a_request_began(make_asker: Any) -> None:
    asker = make_asker(capacity=2)
    error(asker.post("/v1/completions", model="base", prompt="a", n=3), 429)
    assert asker.engine.running == 0


def test_an_answer_that_takes_too_long_is_broken_off(make_asker: Any) -> None:
    asker = make_asker({"timeout": 0.05}, pace=0.02)
    assert error(asker.post("/v1/completions", model="base", prompt="a"), 504)["code"] == "timeout"
    assert asker.engine.running == 0
    stream = asker.post("/v1/completions", model="base", prompt="a", stream=True)
    assert "timeout_error" in stream.text or not stream.text.endswith("[DONE]\n\n")
    assert asker.engine.running == 0


def test_a_server_that_is_about_to_end_takes_no_more(asker: Any) -> None:
    async def work(client: httpx.AsyncClient) -> tuple[httpx.Response, ...]:
        asker.server.traffic.is_draining = True
        body = {"model": "base", "prompt": "a"}
        return await client.get("/health"), await client.get("/ready"), await client.post("/v1/completions", json=body)

    health, ready, answer = asker.run(work)
    assert health.status_code == 200
    error(ready, 503)
    assert error(answer, 503)["code"] == "draining"
    assert "retry-after" in answer.headers


def test_every_response_has_the_headers_of_a_careful_server(asker: Any) -> None:
    for response in (asker.ask("GET", "/health"), asker.ask("GET", "/nowhere"), asker.post("/v1/route")):
        headers = response.headers
        assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert headers["x-request-id"]


def test_metrics_have_names_that_begin_with_lorary(asker: Any) -> None:
    async def work(client: httpx.AsyncClient) -> str:
        await client.post("/v1/completions", json={"model": "lib", "prompt": "june"})
        await client.post("/v1/completions", json={"model": "nobody", "prompt": "june"})
        return (await client.get("/metrics")).text

    lines = [line for line in asker.run(work).splitlines() if not line.startswith("#")]
    assert all(line.startswith("lorary_") for line in lines)
    values = dict(line.rsplit(" ", 1) for line in lines)
    assert values['lorary_requests_total{endpoint="/v1/completions",status="200"}'] == "1.0"
    assert values['lorary_requests_total{endpoint="/v1/completions",status="404"}'] == "1.0"
    assert values['lorary_tokens_total{kind="completion"}'] == "16.0"
    assert values['lorary_expert_requests_total{expert="june"}'] == "1.0"
    assert values['lorary_decisions_total{fallback="false",router="auto"}'] == "1.0"
    assert values["lorary_time_to_first_token_seconds_count"] == "1.0"
    assert values["lorary_time_between_tokens_seconds_count"] == "15.0"
    assert (values["lorary_experts"], values["lorary_queue_running"]) == ("3.0", "0.0")


def test_a_page_may_run_its_own_scripts_alone() -> None:
    response = page_response("<html><script>let x = 1</script><script type='module'>let y</script></html>")
    policy = response.headers["content-security-policy"]
    assert policy.count("'sha256-") == 2
    assert "unsafe-inline" not in policy.partition("style-src")[0]


def test_the_page_is_made_once_until_an_adapter_changes(asker: Any) -> None:
    made: list[int] = []

    def make() -> str:
        made.append(1)
        return "<html>a page</html>"

    asker.app = create_app(asker.server, make)
    assert [asker.ask("GET", "/").text for _ in range(2)] == ["<html>a page</html>"] * 2
    assert len(made) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"host": "example.org"}, "needs a token"),
        ({"port": 70000}, "--port"),
        ({"token": "two words"}, "--token"),
        ({"shadow_share": 2.0}, "--shadow-share"),
        ({"log_prompts": True}, "--log"),
        ({"max_prompt_tokens": 0}, "--max-prompt-tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServeSettings(**fields)


def test_a_pattern_that_is_none_is_refused(make_asker: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--redact"):
        make_asker({"redact": ("(",)})
    with pytest.raises(UsageError, match="--log"):
        make_asker({"log": str(tmp_path / "no" / "log")})
