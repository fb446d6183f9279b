"""Adapters that come and go while the library is served."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapters import write_adapter
from tests.conftest import make_random_adapter, make_tiny_model

from lorary.errors import RouterError
from lorary.library.store import Library

ADMIN = {"authorization": "Bearer root"}


@pytest.fixture
def own(make_asker: Callable[..., Any], lent_library: Path, tmp_path: Path) -> Any:
    """A server over a copy of the library."""
    shutil.copytree(lent_library, tmp_path / "lib")
    return make_asker({"admin_token": "root"}, library=Library.open(tmp_path / "lib"))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    adapter = make_random_adapter(make_tiny_model(), "new", torch.Generator().manual_seed(9))
    write_adapter(adapter, tmp_path / "new")
    return {
        "config": (tmp_path / "new" / "adapter_config.json").read_bytes(),
        "weights": (tmp_path / "new" / "adapter_model.safetensors").read_bytes(),
    }


def upload(files: dict[str, bytes]) -> dict[str, Any]:
    # What a client calls its files does not matter.
    return {kind: (f"../../{kind}", data) for kind, data in files.items()}


def test_adapters_are_listed(own: Any) -> None:
    adapters = own.ask("GET", "/v1/adapters").json()["data"]
    assert [adapter["name"] for adapter in adapters] == ["blue", "june", "three"]
    assert set(adapters[0]) == {"name", "rank", "targets", "tasks", "size", "content_hash", "cluster"}
    assert (adapters[0]["rank"], adapters[0]["tasks"]) == (3, ["blue"])


def test_an_adapter_is_added_asked_replaced_and_removed_live(own: Any, files: dict[str, bytes]) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        added = await client.post(
            "/v1/adapters", data={"name": "sky", "tasks": "a, b"}, files=upload(files), headers=ADMIN
        )
        assert (added.status_code, added.json()) == (201, {"name": "sky"})
        answer = await client.post("/v1/completions", json={"model": "lib:sky", "prompt": "a", "max_tokens": 99})
        assert answer.json()["choices"][0]["text"].startswith(" sky says")
        assert own.server.library["sky"].tasks == ("a", "b")
        again = await client.post("/v1/adapters", data={"name": "sky"}, files=upload(files), headers=ADMIN)
        assert again.status_code == 409
        replaced = await client.put("/v1/adapters/blue", files=upload(files), headers=ADMIN)
        assert replaced.status_code == 200
        hashes = {name: own.server.library.provenance(name)["content_hash"] for name in ("blue", "sky")}
        assert hashes["blue"] == hashes["sky"]
        assert (await client.delete("/v1/adapters/sky", headers=ADMIN)).status_code == 200
        assert (await client.delete("/v1/adapters/sky", headers=ADMIN)).status_code == 404
        assert (await client.put("/v1/adapters/sky", files=upload(files), headers=ADMIN)).status_code == 404
        gone = await client.post("/v1/completions", json={"model": "lib:sky", "prompt": "a"})
        assert gone.status_code == 404

    own.run(work)
    assert own.server.library.names() == ["blue", "june", "three"]
    assert own.server.library.verify() == []


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", ".hidden", "-x", "x" * 300, "\x00", "a b"])
def test_a_name_that_could_leave_the_library_is_refused(own: Any, files: dict[str, bytes], name: str) -> None:
    response = own.ask("POST", "/v1/adapters", data={"name": name}, files=upload(files), headers=ADMIN)
    assert response.status_code == 400
    assert own.server.library.names() == ["blue", "june", "three"]


def test_what_is_no_adapter_of_this_base_is_refused_by_the_librarys_checks(own: Any, files: dict[str, bytes]) -> None:
    bad = {
        "no JSON": {**files, "config": b"{"},
        "no tensors": {**files, "weights": b"garbage"},
        "cut": {**files, "weights": files["weights"][:-10]},
        "DoRA without magnitudes": {**files, "config": b'{"use_dora": true,' + files["config"].lstrip()[1:]},
    }
    for what, changed in bad.items():
        response = own.ask("POST", "/v1/adapters", data={"name": "bad"}, files=upload(changed), headers=ADMIN)
        assert response.status_code == 400, what
        assert response.json()["error"]["message"], what
    assert own.ask("POST", "/v1/adapters", data={"name": "bad"}, headers=ADMIN).status_code == 400
    assert own.server.library.names() == ["blue", "june", "three"]


def test_an_adapter_that_cannot_be_seated_leaves_the_library_as_it_was(own: Any, files: dict[str, bytes]) -> None:
    own.engine.seat_error = RouterError("it must be prepared before")
    before = own.server.library.provenance("blue")["content_hash"]
    added = own.ask("POST", "/v1/adapters", data={"name": "sky"}, files=upload(files), headers=ADMIN)
    replaced = own.ask("PUT", "/v1/adapters/blue", files=upload(files), headers=ADMIN)
    assert (added.status_code, replaced.status_code) == (400, 400)
    assert own.server.library.names() == ["blue", "june", "three"]
    assert own.server.library.provenance("blue")["content_hash"] == before


def test_uploads_are_bounded(make_asker: Callable[..., Any], files: dict[str, bytes]) -> None:
    asker = make_asker({"admin_token": "root", "max_upload": 5000})
    large = {**files, "weights": b"x" * 20_000}
    response = asker.ask("POST", "/v1/adapters", data={"name": "sky"}, files=upload(large), headers=ADMIN)
    assert response.status_code == 413


def test_the_last_adapter_stays(own: Any) -> None:
    own.engine.names[:] = ["blue"]
    assert own.ask("DELETE", "/v1/adapters/blue", headers=ADMIN).status_code == 409
