"""`lorary serve --upstream`: what is loaded here, and what is asked there."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_upstream import FakeUpstream, LiveTransport
from torch import Tensor

from lorary.library.prepared import Prepared, expert_key, save_prepared
from lorary.library.store import Library
from lorary.model import features
from lorary.recipes.serve import run_serve
from lorary.serve.settings import ServeSettings
from lorary.serve.upstream import Upstream
from lorary.serve.upstream_settings import UpstreamSettings

Make = Callable[..., Any]
NAMES = ("blue", "june")


@pytest.fixture
def library(
    tiny_base_folder: Path, tiny_model: Make, random_adapter: Make, generator: torch.Generator, tmp_path: Path
) -> Library:
    made, model = Library.create(tmp_path / "lib", str(tiny_base_folder)), tiny_model()
    for name in NAMES:
        made.add_adapter(random_adapter(model, name, generator), {"tasks": [name], "template": "plain"})
    return made


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, library: Library) -> Callable[..., tuple[FakeUpstream, httpx.Response]]:
    """Serve the library before a fake server, and ask for one completion."""
    behind = FakeUpstream.of_vllm(NAMES)
    replies: list[httpx.Response] = []

    async def drive(app: Any) -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=LiveTransport(app), base_url="http://127.0.0.1") as client,
        ):
            replies.append(await client.post("/v1/completions", json={"model": "lib", "prompt": "which june?"}))

    def run(app: Any, _server: Any, place: Any, ready: Callable[[str], None]) -> None:
        ready("http://127.0.0.1:1")
        asyncio.run(drive(app))

    monkeypatch.setattr("lorary.serve.run.run", run)
    monkeypatch.setattr("lorary.serve.upstream.Upstream", partial(Upstream, transport=LiveTransport(behind)))

    def serve(**route: Any) -> tuple[FakeUpstream, httpx.Response]:
        upstream = UpstreamSettings(url="http://127.0.0.1:1")
        run_serve(str(library.path), ServeSettings(port=0), ready=lambda *_: None, upstream=upstream, **route)
        return behind, replies[-1]

    return serve


def test_the_base_decides_here_and_the_answer_comes_from_there(ask: Any) -> None:
    behind, response = ask(router="logo", top_k=1)
    assert response.status_code == 200
    (asked,) = behind.answered
    assert asked["model"] in NAMES
    assert response.headers["x-lorary-router"] == "logo"
    assert response.headers["x-lorary-experts"] == f"{asked['model']}=1.000"


def test_a_router_that_reads_text_needs_no_base(ask: Any, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(texts: list[str]) -> Tensor:
        return torch.stack([torch.tensor([1.0, float("june" in text)]) for text in texts])

    def load(*_args: object, **_options: object) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr(features, "embed_texts", embed)
    monkeypatch.setattr("lorary.recipes.serve.load_base", load)
    for name, corner in zip(NAMES, ((1.0, 0.0), (0.1, 1.0)), strict=True):
        known = Prepared({"request": torch.tensor(corner)}, {}, {})
        save_prepared(library, "retrieval_text", expert_key(library, name), known)
    behind, response = ask(router="retrieval", features="text", top_k=1)
    assert response.status_code == 200
    assert behind.answered[0]["model"] == "june"
