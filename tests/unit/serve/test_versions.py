"""An engine that follows its library while other commands change it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from served import PROMPT, another_adapter, make_library

from lorary.errors import AdapterError
from lorary.evaluate.completion import complete
from lorary.library.store import Library
from lorary.model.attach import attach, routing
from lorary.model.base import load_base
from lorary.route.setting import Routing
from lorary.serve import versions
from lorary.serve.engine import Job
from lorary.serve.following import FollowingEngine
from lorary.serve.sizes import Sizes
from lorary.serve.versions import Versions


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "LOOK_S", 0.01)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def expected(library: Library, base_folder: Path, name: str) -> list[int]:
    base = load_base(str(base_folder))
    attach(base.model, library)
    with routing(base.model, Routing(experts=[name])):
        return complete(base, tuple(PROMPT), max_new_tokens=12)


def test_one_process_follows_what_other_commands_change(tmp_path: Path, tiny_base_folder: Path) -> None:
    library, base = make_library(tmp_path / "lib", tiny_base_folder), load_base(str(tiny_base_folder))
    attach(base.model, library)
    engine = FollowingEngine(base, Sizes(), library.stamps(), library.stamps)
    other = Library.open(library.path)  # as another command opens it
    looked: list[tuple[str, ...]] = []

    async def changed() -> None:
        looked.append(engine.experts)

    async def answer(name: str) -> list[int]:
        return [token.id async for token in engine.submit(Job(tuple(PROMPT), Routing(experts=[name]), 12))]

    async def work() -> None:
        await engine.start()
        engine.versions.serve(asyncio.Lock(), changed)
        other.add_adapter(another_adapter("new"), {"tasks": []})
        other.remove("three")
        await until(lambda: looked)
        assert engine.experts == looked[-1] == ("blue", "june", "new")
        assert await answer("new") == expected(library, tiny_base_folder, "new")
        before = await answer("june")
        other.replace_adapter(another_adapter("june", seed=5), {"tasks": []})
        await until(lambda: len(looked) == 2)
        assert await answer("june") == expected(library, tiny_base_folder, "june") != before
        await engine.stop(drain=0)

    asyncio.run(work())


class Followed:
    """A library and an engine that are nothing but names."""

    def __init__(self) -> None:
        self.stamps: dict[str, object] = {"blue": 1, "june": 1}
        self.lines: list[str] = []
        self.changes: list[tuple[list[str], list[str]]] = []
        self.versions = Versions(self.stamps, lambda: dict(self.stamps), self.change, self.lines.append)

    async def change(self, removed: Sequence[str], seated: Sequence[str]) -> Mapping[str, Exception]:
        self.changes.append((list(removed), list(seated)))
        return {name: AdapterError("an adapter must fit") for name in seated if name == "bad"}


def test_half_of_a_requests_change_is_not_noticed() -> None:
    followed, requests = Followed(), asyncio.Lock()

    async def changed() -> None:
        followed.lines.append("changed")

    async def work() -> None:
        followed.versions.serve(requests, changed)
        watching = asyncio.create_task(followed.versions.watch())
        async with requests:
            await followed.versions.unseat("june")  # which is in the library still
            await asyncio.sleep(0.1)
            del followed.stamps["june"]
        await asyncio.sleep(0.1)
        assert followed.changes == [(["june"], [])]
        assert followed.lines == []
        watching.cancel()

    asyncio.run(work())


def test_a_library_that_another_command_empties_is_said_once_and_served_as_it_was() -> None:
    followed = Followed()

    async def work() -> None:
        watching = asyncio.create_task(followed.versions.watch())
        followed.stamps = {}
        await until(lambda: followed.lines)
        await asyncio.sleep(0.1)
        assert len(followed.lines) == 1
        assert "holds no adapter any more: those that it held are served" in followed.lines[0]
        assert followed.changes == []
        assert followed.versions.names == ("blue", "june")
        followed.stamps = {"new": 1}
        await until(lambda: followed.changes)
        assert followed.changes == [(["blue", "june"], ["new"])]
        watching.cancel()

    asyncio.run(work())


def test_what_is_refused_is_tried_again_once_it_has_changed() -> None:
    followed = Followed()

    async def work() -> None:
        watching = asyncio.create_task(followed.versions.watch())
        followed.stamps = {"blue": 1, "june": 1, "bad": 1}
        await until(lambda: len(followed.lines) == 2)
        await asyncio.sleep(0.1)
        assert followed.changes == [([], ["bad"])]
        assert followed.versions.names == ("blue", "june")
        followed.stamps = {"blue": 1, "june": 1, "bad": 2}
        await until(lambda: len(followed.lines) == 4)
        assert followed.changes == [([], ["bad"])] * 2
        watching.cancel()

    asyncio.run(work())


def test_a_library_that_is_away_is_served_as_it_was() -> None:
    followed = Followed()
    stamps, followed.stamps = followed.stamps, {}

    async def work() -> None:
        watching = asyncio.create_task(followed.versions.watch())
        await asyncio.sleep(0.1)
        assert followed.versions.names == ("blue", "june")
        followed.stamps = stamps
        await asyncio.sleep(0.1)
        assert followed.changes == []
        watching.cancel()

    asyncio.run(work())
