"""A server over a library of three tiny experts and an engine without a model, asked in process."""

import asyncio
import copy
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_engine import FakeEngine
from fastapi import FastAPI
from tests.conftest import TINY_VOCABULARY, make_random_adapter, make_tiny_model

from lorary.library.store import Library
from lorary.serve.app import create_app
from lorary.serve.prompts import Prompts
from lorary.serve.server import Server
from lorary.serve.settings import ServeSettings

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = ["blue", "june", "three"]


@pytest.fixture(scope="session")
def lent_library(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """The folder of a library; do not change it."""
    folder = tmp_path_factory.mktemp("served") / "lib"
    library = Library.create(folder, str(tiny_base_folder))
    generator, model = torch.Generator().manual_seed(1), make_tiny_model()
    for name in NAMES:
        adapter = make_random_adapter(model, name, generator)
        library.add_adapter(adapter, {"tasks": [name], "template": "plain"})
    library.set_default_router({"router": "auto", "top_k": 1, "temperature": 1.0, "mix": "outputs", "experts": None,
                                "threshold": 0.0, "fallback": "chat"})  # fmt: skip
    return folder


@pytest.fixture
def library(lent_library: Path) -> Library:
    return Library.open(lent_library)


@pytest.fixture(scope="session")
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


class Asker:
    """A server and a client that asks it."""

    def __init__(self, library: Library, tokenizer: Any, engine: FakeEngine, **settings: Any) -> None:
        prompts = Prompts(
            library, tokenizer, context=256, num_tokens=TINY_VOCABULARY, most=settings.get("max_prompt_tokens")
        )
        self.engine = engine
        self.server = Server(engine, library, prompts, ServeSettings(**settings))
        self.app: FastAPI = create_app(self.server)

    def run(self, work: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
        """Do something with a client of the running server."""

        async def main() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
            async with (
                self.app.router.lifespan_context(self.app),
                httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
            ):
                return await work(client)

        return asyncio.run(main())

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request."""
        response: httpx.Response = self.run(lambda client: client.request(method, path, **options))
        return response

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.ask("POST", path, json=body)


@pytest.fixture
def make_asker(library: Library, chat_tokenizer: Any) -> Callable[..., Asker]:
    """A factory: `make_asker(pace=0.01, settings={"token": "secret"})`."""

    def make(settings: dict[str, Any] | None = None, library: Library = library, **engine: Any) -> Asker:
        fake = FakeEngine(chat_tokenizer, list(library.names()), **engine)
        return Asker(library, chat_tokenizer, fake, **(settings or {}))

    return make


@pytest.fixture
def asker(make_asker: Callable[..., Asker]) -> Asker:
    return make_asker()
