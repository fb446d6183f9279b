"""Generated programs: what they cannot do, and that nothing is left of them. Each is a scored failure."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorary.errors import UsageError
from lorary.evaluate import sandbox
from lorary.evaluate.sandbox import Limits, RunOutcome, Sandbox, isolation, make_sandbox
from lorary.evaluate.sandbox_launcher import FORBIDDEN

QUICK = Limits(wall_s=0.5)
ISOLATED = isolation()
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
isolated = pytest.mark.skipif(
    ISOLATED == "none", reason="nothing isolates programs here: neither bubblewrap nor namespaces work"
)


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A variable in the environment of all processes of this test's programs, by which they are found."""
    monkeypatch.setitem(sandbox.ENVIRONMENT, "MARK", str(tmp_path))
    return f"MARK={tmp_path}"


def processes_with(mark: str) -> list[str]:
    """Processes that run and carry a mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                carries = mark.encode() in (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if carries:
                found.append(folder.name)
    return found


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture(params=[pytest.param("isolated", marks=isolated), "none"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A sandbox whose folders lie in tmp_path: as good as it gets here, and without isolation."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    return Sandbox(ISOLATED if request.param == "isolated" else "none")


@pytest.fixture
def walled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    return Sandbox(ISOLATED)


ANYWHERE = {
    "a wrong answer": ("assert 1 + 1 == 3", "failed", "AssertionError"),
    "a syntax error": ("def f(:", "failed", "SyntaxError"),
    "half a surrogate in the message": ("raise ValueError('\\ud800')", "failed", "ValueError"),
    "leaving before the tests": ("import os; os._exit(0)", "failed", "before its tests"),
    "leaving politely before the tests": ("raise SystemExit(0)", "failed", "SystemExit"),
    "sleeping": ("import time; time.sleep(60)", "timeout", "wall time"),
    "printing forever": ("while True: print('x' * 10000)", "timeout", "wall time"),
    "forking without end": ("import os\nwhile True: os.fork()", "failed", ""),
    "too much memory": ("bytearray(8 << 30)", "failed", "MemoryError"),
    "a file that grows without end": ("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))", "failed", "OSError"),
    "a file elsewhere": ("open('/etc/lorary-was-here', 'w')", "failed", "Error"),
    "too many open files": ("f = [open('/dev/null') for _ in range(100)]", "failed", "Too many open files"),
    "killing its group": ("import os; os.kill(0, 9)", "killed", "SIGKILL"),
    "a crash of the interpreter": ("import ctypes; ctypes.string_at(0)", "killed", "SIGSEGV"),
    "reading stdin": ("input()", "failed", "EOFError"),
    "closing all files": ("import os; os.closerange(0, 100)", "failed", "before its tests"),
    "a package that is installed here": ("import torch", "failed", "ModuleNotFoundError"),
}


# Enough to see that the launcher, not the wall, ends and counts them.
WITHOUT_A_WALL = ("sleeping", "forking without end", "too much memory", "killing its group", "closing all files")


@pytest.mark.parametrize(
    ("name", "isolation"),
    [*((name, ISOLATED) for name in ANYWHERE if ISOLATED != "none"), *((name, "none") for name in WITHOUT_A_WALL)],
)
def test_it_is_a_failure_and_leaves_nothing(
    name: str, isolation: str, walled: Sandbox, tmp_path: Path, mark: str
) -> None:
    program, status, detail = ANYWHERE[name]
    limits = QUICK if status == "timeout" else Limits()
    outcome = Sandbox(isolation, limits).run(program)
    assert (outcome.status, outcome.passed) == (status, False), outcome
    assert detail in outcome.detail
    assert left_over(tmp_path) == []
    assert processes_with(mark) == []
    assert not Path("/etc/lorary-was-here").exists()


def test_a_program_that_reaches_its_end_passes(anywhere: Sandbox) -> None:
    assert anywhere.run("open('x', 'w').write('y')\nassert open('x').read() == 'y'") == RunOutcome("passed")


def test_its_folder_is_empty_and_its_environment_holds_nothing_of_ours(
    anywhere: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORARY_SECRET", "x")
    assert anywhere.run("import os\nassert os.listdir('.') == []\nassert 'LORARY_SECRET' not in os.environ").passed


def test_processes_that_leave_the_group_end_with_the_program(anywhere: Sandbox, mark: str) -> None:
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
        "os.wait()"
    )
    assert anywhere.run(program).passed
    assert processes_with(mark) == []


def test_processes_are_found_by_their_mark(mark: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=sandbox.ENVIRONMENT) as process:
        assert processes_with(mark) == [str(process.pid)]


def test_only_the_program_itself_reports_not_what_it_forked(anywhere: Sandbox) -> None:
    assert anywhere.run("import os\nif os.fork(): os.wait()").passed
    assert not anywhere.run("import os, time\nif os.fork():\n    time.sleep(0.2)\n    os._exit(0)").passed


def test_the_time_on_the_processor_is_limited_too() -> None:
    outcome = Sandbox(ISOLATED, Limits(wall_s=60.0, cpu_s=1)).run("while True: pass")
    assert outcome.status == "killed"


def test_what_comes_after_a_program_that_broke_everything_goes_on(anywhere: Sandbox) -> None:
    anywhere.run("import os; os.kill(os.getppid(), 9); os.kill(0, 9)")
    assert anywhere.run("assert True").passed


@isolated
def test_the_parent_survives_its_child(walled: Sandbox) -> None:
    outcome = walled.run("import os\ntry: os.kill(os.getppid(), 9)\nfinally: assert False, 'still here'")
    assert outcome == RunOutcome("failed", "AssertionError: still here") or outcome.status == "broken"


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1)",
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "for i in range(9): open(f'x{i}', 'wb').write(bytes(8 << 20))",
        "open('/usr/x', 'w')",
        "import ctypes; assert ctypes.CDLL(None).mount(b't', b'/work', b'tmpfs', 0, None) == 0",
        "import os; os.chroot('/work')",
        "import os; assert os.path.exists(HERE)",
        "import os; os.kill(OURS, 0)",
    ],
)
def test_behind_the_wall_there_is_nothing_to_reach(program: str, walled: Sandbox) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = program.replace("PORT", str(port)).replace("HERE", repr(__file__)).replace("OURS", str(os.getpid()))
        assert walled.run(program).status == "failed"


@isolated
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_a_wall_too(tmp_path: Path) -> None:
    source = Path(sandbox.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r})\n"
        "from lorary.evaluate.sandbox import isolation, make_sandbox\n"
        "box = make_sandbox()\n"
        "print(box.isolation, box.run('x = 1').status, box.run('open(\"/usr/x\", \"w\")').status)"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            done = subprocess.run(
                [python, "-c", code], capture_output=True, text=True, user=65534, group=65534, extra_groups=[], cwd="/"
            )
        except OSError:
            continue
        if done.returncode == 0:
            assert done.stdout.split()[1:] == ["passed", "failed"]
            return
        if "neither works here" in done.stderr:
            pytest.skip("an ordinary user may not make namespaces here")
    pytest.skip("an ordinary user may not read this Python or this package")


WORKS = (
    "from lorary.evaluate.sandbox import isolation, make_sandbox\n"
    "box = make_sandbox()\n"
    "print(box.isolation, box.run('x = 1').status, box.run('open(\"/usr/x\", \"w\")').status, "
    "box.run('import os; os.chroot(\"/work\")').detail)"
)


@isolated
def test_root_of_a_namespace_that_knows_no_other_user_has_a_wall_too() -> None:
    inside = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*inside, "unshare", "--user", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("there are no user namespaces inside user namespaces here")
    source = Path(sandbox.__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(source)!r})\n{WORKS}"
    done = subprocess.run([*inside, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:3] == ["passed", "failed"]
    assert "PermissionError" in done.stdout


@pytest.mark.parametrize(
    ("users", "groups", "low", "high"),
    [
        (["0 0 4294967295"], ["0 0 4294967295"], 1 << 30, 1 << 31),
        (["0 0 65536"], ["0 0 65536"], 40_000, 65_536),
        (["0 1000 1", "1 100000 65536"], ["0 1000 1", "1 100000 65536"], 40_000, 65_537),
        (["0 1000 1", "200000 100000 9000"], ["0 1000 1", "200000 100000 65536"], 200_000, 209_000),
    ],
)
def test_a_spare_user_is_one_that_the_namespace_knows(
    users: list[str], groups: list[str], low: int, high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = {"uid_map": users, "gid_map": groups}
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "\n".join(maps[path.name]))
    drawn = [sandbox._spare_uid() for _ in range(200)]
    assert all(uid is not None and low <= uid < high for uid in drawn)
    assert len(set(drawn)) > 100
    for kind in maps:
        monkeypatch.setitem(maps, kind, ["0 1000 1"])
        assert sandbox._spare_uid() is None


@isolated
def test_python_behind_a_link_is_found_inside(
    walled: Sandbox, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("links")
    (folder / "between").symlink_to(sys.base_prefix)
    (folder / "python").symlink_to("between")
    monkeypatch.setattr(sys, "base_prefix", str(folder / "python"))
    assert walled.run(f"import os, decimal\nassert os.path.isdir({str(folder / 'python' / 'lib')!r})") == RunOutcome(
        "passed"
    )


def test_bubblewrap_is_told_of_a_link_and_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "link"))
    command = Sandbox("bubblewrap")._command(None)
    told = list(zip(command, command[1:], command[2:], strict=False))
    assert ("--ro-bind", str(real), str(real)) in told
    assert ("--symlink", str(real), str(tmp_path / "link")) in told


def test_without_isolation_nothing_runs_unless_it_is_consented_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: "none")
    with pytest.raises(UsageError, match=r"may only run isolated(.|\n)*remedy: install bubblewrap; or --unsafe-code"):
        make_sandbox()
    monkeypatch.setattr(sandbox, "_works", lambda made: True)
    assert make_sandbox(unsafe=True).isolation == "none"


def test_unsafe_running_is_refused_too_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: "none")
    monkeypatch.setattr(sandbox, "_works", lambda made: False)
    with pytest.raises(UsageError, match="must find the Python standard library"):
        make_sandbox(unsafe=True)


@isolated
def test_consent_does_not_weaken_what_can_be_isolated() -> None:
    assert make_sandbox(unsafe=True).isolation == ISOLATED


def test_a_machine_without_the_programs_that_isolate_has_no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    assert isolation.__wrapped__() == "none"


def test_time_is_bounded_even_where_the_launcher_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_launcher", lambda: "import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "GRACE_S", 0.2)
    started = time.monotonic()
    assert Sandbox("none", Limits(wall_s=0.2)).run("x = 1").status == "timeout"
    assert time.monotonic() - started < 30


# What no namespace and no limit of memory covers: the kernel's keys, shared memory, queues, files without a folder.
CALLS = {
    "keyctl": "(0, -3, 1)",
    "add_key": "(b'user', b'lorary', b'x', 1, -5)",
    "request_key": "(b'user', b'lorary', None, 0)",
    "shmget": "(0, 1 << 20, 0o1600)",
    "msgget": "(0, 0o1600)",
    "semget": "(0, 1, 0o1600)",
    "mq_open": "(b'lorary', 0o102, 0o600, None)",
    "memfd_create": "(b'x', 0)",
}


@pytest.mark.skipif(os.uname().machine not in FORBIDDEN, reason="the filter knows the numbers of other machines")
@pytest.mark.parametrize("call", CALLS)
def test_what_lies_outside_of_namespaces_and_limits_cannot_be_reached(call: str, anywhere: Sandbox) -> None:
    number = FORBIDDEN[os.uname().machine][1][call]
    program = (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"assert libc.syscall({number}, *{CALLS[call]}) == -1\n"
        "assert ctypes.get_errno() in (errno.EPERM, errno.ENOSYS), ctypes.get_errno()\n"
        "import os\nassert os.fork() == 0 or os.wait()[1] == 0"
    )
    assert anywhere.run(program) == RunOutcome("passed")


@isolated
def test_there_is_no_memory_to_write_files_to_beside_its_folder(walled: Sandbox) -> None:
    program = (
        "import os\nfor folder in ('/dev/shm', '/dev', '/tmp', '/run', '/var/tmp', '/'):\n"
        "    try:\n        open(os.path.join(folder, 'x'), 'w')\n    except OSError:\n        continue\n"
        "    raise AssertionError(folder)"
    )
    assert walled.run(program) == RunOutcome("passed")


def test_bubblewrap_leaves_no_device_folder_to_write_to() -> None:
    command = Sandbox("bubblewrap")._command(None)
    assert command[command.index("--dev") : command.index("--dev") + 4] == ["--dev", "/dev", "--remount-ro", "/dev"]
