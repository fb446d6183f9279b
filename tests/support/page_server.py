"""A server that answers as `lorary serve` does, for the page: always the same, and in no time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

MODELS = ("lib", "lib@arrow", "lib:facts_0002", "base")
REFUSAL = "the prompt must fit the context of the base model\nfound: 9000 tokens"
RECEIPT: dict[str, Any] = {
    "id": "req-1",
    "router": "auto",
    "rule": "contrast",
    "is_fallback": False,
    "confidence": 0.82,
    "threshold": 0.5,
    "sentence": "contrast chose facts_0002: 0.82 reaches the threshold 0.50.",
    "experts": [{"name": "facts_0002", "weight": 0.75}, {"name": "dates_0001", "weight": 0.25}],
    "rejected": [{"name": "strings_0003", "score": 0.31}, {"name": "arithmetic_0000", "score": -0.2}],
    "ms": 6.4,
    "num_tokens": 3,
}
TRACE: dict[str, Any] = {
    "tokens": [
        {"text": "Capital", "experts": [{"name": "facts_0002", "weight": 0.9}, {"name": "dates_0001", "weight": 0.1}]},
        {
            "text": "\n",
            "experts": [{"name": "dates_0001", "weight": 1.0}],
            "layers": [{"group": "layer 7", "experts": [{"name": "dates_0001", "weight": 1.0}]}],
        },
        {"text": " Paris", "experts": []},
    ],
    "layers": [{"group": f"layer {i}", "experts": [{"name": "facts_0002", "weight": 0.5}]} for i in range(2)],
}
PIECES = (" Par", "is", " <b>ü</b>\n")
USAGE: dict[str, Any] = {
    "requests": 1234,
    "fallback": 57,
    "experts": {"facts_0002": 700, "dates_0001": 320},
    "shadow": {"router": "arrow", "requests": 240, "agree": 199},
}
SHADOW = {"router": "arrow", "winner": "strings_0003", "agrees": False}


@dataclass
class PageServer:
    """Where it is, what it was asked, and how it answers.

    Args:
        url: of the page.
        token: that requests must bring; none where empty.
        asked: path and body of each question that was answered.
        usage: what `/v1/usage` says.
        is_cut: whether answers break off in the middle.
    """

    url: str = ""
    token: str = ""
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=lambda: dict(USAGE))
    is_cut: bool = False


@contextmanager
def page_server(page: str) -> Iterator[PageServer]:
    """Serve a page at `/` of a free port of this machine."""
    state = PageServer()

    class Handler(_Handler):
        html, server_state = page, state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _decision(decision_id: str) -> dict[str, Any]:
    """A decision as it is shown again; the first one has one in the shadow."""
    first = {"shadow": SHADOW, "confidence": -1.25, "threshold": 0.0}
    return {**RECEIPT, "id": decision_id, **(first if decision_id == "req-0" else {})}


class _Handler(BaseHTTPRequestHandler):
    html: str
    server_state: PageServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, "text/html; charset=utf-8", self.html.encode())
        elif self.path == "/favicon.ico":
            self._send(204, "image/x-icon", b"")
        elif not self._is_known():
            self._json({"error": {"message": "a token is needed"}}, 401)
        elif self.path == "/v1/models":
            self._json({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})
        elif self.path == "/v1/usage":
            self._json(self.server_state.usage)
        elif self.path.startswith("/v1/decisions?"):
            self._json({"data": [_decision(f"req-{i}") for i in range(3)]})
        else:
            self._json(_decision(self.path.rpartition("/")[2]))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self._is_known():
            self._json({"error": {"message": "a token is needed"}}, 401)
            return
        self.server_state.asked.append((self.path, body))
        if self.path == "/v1/route":
            self._json({**RECEIPT, **(TRACE if body.get("trace") else {})})
        elif body["model"] == "base":
            self._json({"error": {"message": REFUSAL}}, 400)
        else:
            self._stream(is_chat="chat" in self.path, has_trace=bool(body.get("trace")))

    def _stream(self, *, is_chat: bool, has_trace: bool) -> None:
        parts = [{"delta": {"content": text}} if is_chat else {"text": text} for text in PIECES]
        events: list[dict[str, Any]] = [{"choices": [{"index": 0, "finish_reason": None, **part}]} for part in parts]
        events[-1]["choices"][0]["finish_reason"] = "stop"
        if has_trace:
            events.append({"choices": [], "lorary": {**RECEIPT, **TRACE}})
        texts = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
        data = "".join(texts[:1] if self.server_state.is_cut else [*texts, "data: [DONE]\n\n"]).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-request-id", "req-1")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        # Pieces of the network end anywhere, even inside a character.
        for start in range(0, len(data), 37):
            self.wfile.write(data[start : start + 37])
            self.wfile.flush()

    def _is_known(self) -> bool:
        return not self.server_state.token or self.headers.get("authorization") == f"Bearer {self.server_state.token}"

    def _json(self, document: Any, status: int = 200) -> None:
        self._send(status, "application/json", json.dumps(document).encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
