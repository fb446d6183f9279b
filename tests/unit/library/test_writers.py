"""Writers that are killed, that meet, or that find no room: the library holds the old or the new, whole."""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorary.adapter import Adapter
from lorary.errors import LibraryError, UsageError
from lorary.library.layout import BUILD_PID
from lorary.library.lock import build_lock, write_lock
from lorary.library.store import Library

MakeAdapter = Callable[..., Adapter]
Q_PROJ = "model.layers.0.self_attn.q_proj"
# Every system call by which a change reaches the disk.
CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")

# Forking is how a writer becomes a process of its own within milliseconds; its children use no threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def in_child(work: Callable[[], object]) -> int:
    """Start a process that does some work and ends: with 0, with 1 after an error, or killed."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def ending(child: int) -> int:
    """Wait for a process; its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Act just before the system call of this number; calls are counted from 0."""
    calls = iter(range(10_000))

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            if next(calls) == number:
                act()
            return original(*args, **keywords)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def value_of(library: Library, name: str) -> float:
    """The one value of an adapter; fails on a mixture of two adapters."""
    adapter = library.get(name)
    values = {float(value) for _, factors in adapter for t in (factors.lora_a, factors.lora_b) for value in t.unique()}
    assert len(values) == 1
    return values.pop()


def killed_at_each_call(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Iterator[int]:
    """Do some work in processes that are killed before their first, second, ... system call, until one survives."""
    for number in range(200):

        def work_and_die(number: int = number) -> None:
            with monkeypatch.context() as patch:
                on_call(patch, number, die)
                work()

        status = ending(in_child(work_and_die))
        assert status in (0, -signal.SIGKILL)
        yield number
        if status == 0:
            return
    raise AssertionError("the work never came to its end")


def test_a_writer_killed_while_adding_leaves_nothing_or_all(
    library: Library, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add_adapter(make_adapter("old", 1.0), {})
    moments = set()
    for moment in killed_at_each_call(monkeypatch, lambda: library.add_adapter(make_adapter("new", 2.0), {})):
        assert library.verify() == []
        assert library.names() in (["old"], ["new", "old"])
        moments.add((moment, len(library)))
        # The next writer clears what was left, whatever it does.
        library.replace_adapter(make_adapter("old", 1.0), {})
        assert not (library.path / ".staging").exists()
        if "new" in library:
            assert value_of(library, "new") == 2.0
            library.remove("new")
    assert {count for _, count in moments} == {1, 2}
    assert len(moments) > 10


def test_a_writer_killed_while_replacing_leaves_the_old_or_the_new(
    library: Library, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add_adapter(make_adapter("x", 1.0), {})
    seen, gaps = set(), 0
    for _ in killed_at_each_call(monkeypatch, lambda: library.replace_adapter(make_adapter("x", 2.0), {})):
        gaps += not (library.path / "adapters" / "x").exists()
        # As a reader finds it, and again after the next writer has cleared up.
        for clear_up in (lambda: None, lambda: library.set_default_router(library.default_router)):
            clear_up()
            assert library.names() == ["x"]
            assert library.verify() == []
            seen.add(value_of(library, "x"))
        assert not (library.path / ".staging").exists()
        assert (library.path / "adapters" / "x").is_dir()
        library.replace_adapter(make_adapter("x", 1.0), {})
    assert seen == {1.0, 2.0}
    assert gaps > 0


def test_a_writer_killed_while_removing_leaves_all_or_nothing(
    library: Library, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.add_adapter(make_adapter("x"), {})
    for _ in killed_at_each_call(monkeypatch, lambda: library.remove("x")):
        assert library.verify() == []
        if "x" not in library:
            library.add_adapter(make_adapter("x"), {})


def test_a_writer_killed_while_creating_leaves_nothing_or_a_library(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    for _ in killed_at_each_call(monkeypatch, lambda: Library.create(path, tiny_base_folder)):
        if not (path / "library.json").exists():
            Library.create(path, tiny_base_folder)
        assert Library.open(path).verify() == []
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_readers_see_whole_adapters_while_a_writer_is_killed_at_random(
    library: Library, make_adapter: MakeAdapter
) -> None:
    library.add_adapter(make_adapter("x", 1.0), {})
    draw, seen = random.Random(0), set()

    def replace_for_ever() -> None:
        for value in range(1, 10_000):
            library.replace_adapter(make_adapter("x", float(value % 2 + 1)), {})

    for _ in range(6):
        child = in_child(replace_for_ever)
        until = time.monotonic() + draw.uniform(0.05, 0.25)
        while time.monotonic() < until:
            assert library.names() == ["x"]
            seen.add(value_of(library, "x"))
        os.kill(child, signal.SIGKILL)
        assert ending(child) == -signal.SIGKILL
        assert library.verify() == []
    assert seen == {1.0, 2.0}


def test_two_writers_at_once_both_succeed_and_one_name_is_given_once(
    library: Library, make_adapter: MakeAdapter
) -> None:
    def add_some(mine: str) -> None:
        for number in range(5):
            library.add_adapter(make_adapter(f"{mine}{number}", 1.0), {})
        library.add_adapter(make_adapter("both", 2.0), {})

    children = [in_child(lambda mine=mine: add_some(mine)) for mine in ("a", "b")]
    assert sorted(ending(child) for child in children) == [0, 1]
    assert library.names() == [*(f"a{n}" for n in range(5)), *(f"b{n}" for n in range(5)), "both"]
    assert library.verify() == []


class Failure:
    """An error of the operating system at one call, and whether it came."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.came = False

    def __call__(self) -> None:
        self.came = True
        raise OSError(self.code, os.strerror(self.code), "somewhere")


@pytest.mark.parametrize("act", ["add", "replace", "settings"])
def test_a_change_without_space_is_one_error_and_nothing_half(
    library: Library, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    library.add_adapter(make_adapter("x", 1.0), {})
    changes = {
        "add": lambda: library.add_adapter(make_adapter("y", 2.0), {}),
        "replace": lambda: library.replace_adapter(make_adapter("x", 2.0), {}),
        "settings": lambda: library.set_default_router({**library.default_router, "top_k": 9}),
    }
    errors = []
    for number in range(200):
        failure = Failure(errno.ENOSPC)
        with monkeypatch.context() as patch:
            on_call(patch, number, failure)
            try:
                changes[act]()
            except LibraryError as error:
                errors.append(str(error))
        assert Library.open(library.path).verify() == []
        assert library.names() in (["x"], ["x", "y"])
        assert value_of(library, "x") in (1.0, 2.0)
        if not failure.came:
            break
        library.replace_adapter(make_adapter("x", 1.0), {})
        if "y" in library:
            library.remove("y")
    assert not failure.came
    assert len(errors) >= 3
    assert all("free some space" in error and "No space left on device" in error for error in errors)


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.EACCES, "make the folder writable"), (errno.EIO, "repair the file system")]
)
def test_another_failure_says_what_to_do_too(
    library: Library, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: Failure(code)())
    with pytest.raises(LibraryError, match=rf"(?s)must be writable.*{remedy}"):
        library.add_adapter(make_adapter("x"), {})
    assert library.names() == []


def test_a_library_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, tiny_base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = []
    for number in range(200):
        path, failure = tmp_path / str(number), Failure(errno.ENOSPC)
        with monkeypatch.context() as patch:
            on_call(patch, number, failure)
            try:
                Library.create(path, tiny_base_folder)
            except (LibraryError, UsageError) as error:  # the base is read through a temporary folder
                errors.append(str(error))
        assert not path.exists() or Library.open(path).verify() == []
        if not failure.came:
            break
    assert not failure.came
    assert len(errors) >= 2
    assert all("free some space" in error for error in errors)


def holder_of(take: Callable[[], Any]) -> int:
    """Start a process that takes a lock and keeps it; its id, once it has the lock."""
    read, write = os.pipe()

    def keep() -> None:
        with take():
            os.write(write, b".")
            time.sleep(60)

    child = in_child(keep)
    assert os.read(read, 1) == b"."
    os.close(read)
    os.close(write)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    assert ending(child) == -signal.SIGKILL


def test_a_second_build_is_refused_at_once_with_the_holders_number(library: Library) -> None:
    child = holder_of(library.build_lock)
    try:
        with (
            pytest.raises(LibraryError, match=rf"(?s)one build at a time.*process {child}\b"),
            Library.open(library.path).build_lock(),
        ):
            pass
    finally:
        kill(child)
    with library.build_lock():
        pass
    assert not (library.path / BUILD_PID).exists()


def test_a_build_may_commit_while_it_holds_its_lock(library: Library, make_adapter: MakeAdapter) -> None:
    with library.build_lock():
        library.add_adapter(make_adapter("x"), {})
        with pytest.raises(LibraryError, match="one build at a time"), build_lock(library.path):
            pass
    assert library.names() == ["x"]


def test_a_writer_waits_for_another_and_then_says_so(library: Library) -> None:
    child = holder_of(lambda: write_lock(library.path))
    try:
        start = time.monotonic()
        with (
            pytest.raises(LibraryError, match=f"process {child} is writing, still after"),
            write_lock(library.path, wait_s=0.3),
        ):
            pass
        assert time.monotonic() - start >= 0.3
    finally:
        kill(child)
    with write_lock(library.path, wait_s=0.0):
        pass


def test_readers_need_no_lock(library: Library, make_adapter: MakeAdapter) -> None:
    library.add_adapter(make_adapter("x"), {})
    child = holder_of(lambda: write_lock(library.path))
    try:
        assert Library.open(library.path).names() == ["x"]
        assert library.verify() == []
    finally:
        kill(child)
