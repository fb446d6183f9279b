"""The interface over the real engine: what is answered is what the routed model generates."""

import asyncio
import os
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.unit.serve.conftest import Asker

from lorary.data.text_of_ids import text_of_ids
from lorary.errors import UsageError
from lorary.evaluate.completion import complete
from lorary.library.store import Library
from lorary.model.attach import attach, routing
from lorary.model.base import Base, load_base
from lorary.recipes.serve import run_serve
from lorary.recipes.serve_log import run_serve_log
from lorary.serve.batching import RoutedEngine
from lorary.serve.settings import ServeSettings
from lorary.serve.sizes import Sizes

PROMPTS = ["Name the colour", "Which month follows May in the year?"]
SETTINGS: dict[str, Any] = {
    "lib": "arrow", "base": "base", "lib:june": {"experts": ["june"]}, "lib@uniform": "uniform", "lib@norm": "norm",
}  # fmt: skip
NUM_NEW = 6


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder))


@pytest.fixture
def real(lent_library: Path, tmp_path: Path, base: Base) -> Asker:
    """A server over a copy of the library, with the real engine."""
    shutil.copytree(lent_library, tmp_path / "lib")
    library = Library.open(tmp_path / "lib")
    library.set_default_router({"router": "arrow", "top_k": 2, "temperature": 1.0, "mix": "outputs", "experts": None})
    attach(base.model, library, tokenizer=base.tokenizer)
    engine: Any = RoutedEngine(base, Sizes(rows=4, capacity=64))
    return Asker(library, base.tokenizer, engine, admin_token="root")


def expected(base: Base, setting: Any, prompt: str) -> str:
    """What the routed model generates, asked by itself."""
    ids = tuple(base.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with routing(base.model, setting):
        return text_of_ids(base.tokenizer, complete(base, ids, max_new_tokens=NUM_NEW), ids, special=False)


def test_answers_are_those_of_the_routed_model_whatever_else_is_answered(real: Asker, base: Base) -> None:
    known = {(model, prompt): expected(base, SETTINGS[model], prompt) for model in SETTINGS for prompt in PROMPTS}

    async def one(client: httpx.AsyncClient, model: str, prompt: str) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": NUM_NEW}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    async def work(client: httpx.AsyncClient) -> list[str]:
        return await asyncio.gather(*[one(client, model, prompt) for model, prompt in known])

    assert dict(zip(known, real.run(work), strict=True)) == known


def test_a_real_server_traces_scores_and_changes_experts(real: Asker, base: Base, lent_library: Path) -> None:
    source = lent_library / "adapters" / "june"
    files = {
        kind: (name, (source / name).read_bytes())
        for kind, name in {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}.items()
    }
    headers = {"authorization": "Bearer root"}

    async def work(client: httpx.AsyncClient) -> None:
        route = await client.post("/v1/route", json={"model": "lib", "prompt": PROMPTS[0], "trace": True})
        assert sum(expert["weight"] for expert in route.json()["experts"]) == pytest.approx(1.0, abs=1e-3)
        assert len(route.json()["layers"]) == 2
        body = {"model": "lib", "prompt": PROMPTS[0], "echo": True, "logprobs": 1, "max_tokens": 0}
        scored = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert scored["text"] == PROMPTS[0]
        assert all(logprob < 0 for logprob in scored["logprobs"]["token_logprobs"][1:])
        added = await client.post("/v1/adapters", data={"name": "twin"}, files=files, headers=headers)
        assert added.status_code == 201, added.text
        texts = []
        for model in ("lib:june", "lib:twin"):
            asked = {"model": model, "prompt": PROMPTS[1], "max_tokens": NUM_NEW}
            texts.append((await client.post("/v1/completions", json=asked)).json()["choices"][0]["text"])
        assert texts[0] == texts[1]
        assert (await client.delete("/v1/adapters/twin", headers=headers)).status_code == 200
        assert (await client.post("/v1/completions", json=asked)).status_code == 404

    real.run(work)


def test_the_recipe_serves_until_a_signal_and_finishes_what_it_accepted(lent_library: Path, tmp_path: Path) -> None:
    shutil.copytree(lent_library, tmp_path / "lib")
    answers: list[httpx.Response] = []
    asking: list[threading.Thread] = []

    def ask(address: str) -> None:
        body = {"model": "lib", "prompt": PROMPTS[0], "max_tokens": NUM_NEW}
        answers.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60))

    def ready(address: str, name: str) -> None:
        assert name == "lib"
        asking.append(threading.Thread(target=ask, args=(address,)))
        asking[0].start()
        # In the midst of the answer, where the machine is quick enough.
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    run_serve(str(tmp_path / "lib"), ServeSettings(port=0, log=str(tmp_path / "log")), ready=ready, router="arrow")
    asking[0].join(60)
    assert [answer.status_code for answer in answers] == [200]
    assert signal.getsignal(signal.SIGTERM) is before
    (entry,) = run_serve_log(str(tmp_path / "log")).entries
    assert (entry["router"], entry["outcome"]) == ("arrow", "ok")


def test_a_port_that_is_taken_is_refused_before_the_base_is_loaded(lent_library: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match="must be able to listen"):
            run_serve(str(lent_library), ServeSettings(port=port), ready=print)
