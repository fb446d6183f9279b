"""The schema: what it promises holds for whatever is sent."""

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_the_schema_tells_every_path_and_its_errors(asker: Any) -> None:
    schema = asker.ask("GET", "/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/completions", "/v1/chat/completions", "/v1/route", "/v1/models", "/v1/models/{name}", "/v1/adapters",
        "/v1/adapters/{name}", "/v1/decisions", "/v1/decisions/{decision_id}", "/v1/usage", "/health", "/ready",
        "/metrics",
    }  # fmt: skip
    for methods in schema["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert "422" not in operation["responses"]
            assert {"400", "401", "429", "503"} <= set(operation["responses"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_that_is_sent_breaks_the_promise_of_the_schema(make_asker: Callable[..., Any]) -> None:
    asker = make_asker({"admin_token": "root"})

    async def local(scope: Any, receive: Any, send: Any) -> None:
        """The server, asked by its own name whatever the client calls it."""
        if scope["type"] == "http":
            others = [(name, value) for name, value in scope["headers"] if name.lower() != b"host"]
            scope = {**scope, "headers": [*others, (b"host", b"127.0.0.1")]}
        await asker.app(scope, receive, send)

    with TestClient(local):
        schema = schemathesis.openapi.from_asgi("/openapi.json", local)
        for result in schema.get_all_operations():
            operation = result.ok()

            @hypothesis.settings(max_examples=5, deadline=None, derandomize=True, database=None,
                                 suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
            @hypothesis.given(case=operation.as_strategy())
            def check(case: Any) -> None:
                case.call_and_validate(checks=CHECKS, headers={"authorization": "Bearer root"})

            check()
    assert asker.engine.running == 0
