"""A sandbox for generated programs: each runs in a process of its own that can reach, keep and leave nothing.

Which isolation there is, is found out once, by running a program in it:

- root: Linux namespaces through util-linux `unshare`, and for the program a user of its own without rights;
- other users, and root of a user namespace that knows no users beside it: bubblewrap (`bwrap`) where it is
  installed, else `unshare` with a user namespace;
- neither works: refused, unless unsafe running is consented to. Then the limits below still hold, but the program can
  read and write what this user can, and can use the network.

Every program gets an empty folder, an empty environment, the Python standard library and no network.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lorary.errors import UsageError

LAUNCHER = Path(__file__).with_name("sandbox_launcher.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
# What Python needs beside its own folder. Devices are bound as they are.
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/nix/store")
# The launcher ends a program in time; it is itself ended so many seconds later.
GRACE_S = 5.0
# A range of users that has as many has some that own nothing.
MANY_USERS = 4096
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        wall_s: seconds until it is ended.
        cpu_s: seconds of processor time of each of its processes.
        memory_bytes: address space of each of its processes.
        file_bytes: size of one file.
        disk_bytes: all its files together (with namespaces), which lie in memory.
        processes: processes and threads at a time, its own counted.
        open_files: open files of a process.
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    processes: int = 4
    open_files: int = 64


@dataclass(frozen=True)
class RunOutcome:
    """What became of a program.

    Args:
        status: `passed` (it reached its end), `failed` (an error, or it left early), `timeout`, `killed` (a signal), or
            `broken` (the sandbox said nothing: something ended it from inside).
        detail: in words.
    """

    status: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end without an error."""
        return self.status == "passed"


@dataclass(frozen=True)
class Sandbox:
    """Runs programs; made by `make_sandbox`.

    Args:
        isolation: `namespaces`, `bubblewrap` or `none`.
        limits: of each program.
    """

    isolation: str
    limits: Limits = Limits()

    def run(self, program: str) -> RunOutcome:
        """Run a program to its end, and say whether it got there.

        Nothing that it does raises an error here, and none of its processes and files outlive the call. Its output goes
        nowhere. A program that sets out to forge the verdict can: it shares a process with its tests. Where the machine
        lets no process or folder be made, it is `broken`.
        """
        try:
            return self._run(program)
        except OSError as error:
            return RunOutcome("broken", str(error))

    def _run(self, program: str) -> RunOutcome:
        with tempfile.TemporaryDirectory(prefix="lorary-code-", ignore_cleanup_errors=True) as folder:
            uid = _own_user()
            command, job = self._command(uid), self._job(program, folder, uid)
            # A session of its own: a program that kills its whole group does not reach us.
            with subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            ) as process:
                try:
                    output, errors = process.communicate(json.dumps(job).encode(), timeout=self.limits.wall_s + GRACE_S)
                except subprocess.TimeoutExpired:
                    return RunOutcome("timeout", f"{self.limits.wall_s} s of wall time, and the sandbox did not end")
                finally:
                    process.kill()
        try:
            return RunOutcome(**json.loads(output))
        except (ValueError, TypeError):
            return RunOutcome("broken", errors.decode(errors="replace").strip()[-500:])

    def _command(self, uid: int | None) -> list[str]:
        python = str(_python())
        launch = [python, "-I", "-S", "-B", "-c", _launcher()]
        if self.isolation == "namespaces":
            user = ["--user", "--map-root-user"] if uid is None else []
            kinds = ["--mount", "--pid", "--net", "--ipc", "--uts", "--propagation", "private"]
            return [_program("unshare"), *user, *kinds, "--fork", "--kill-child=KILL", "--", *launch]
        if self.isolation == "bubblewrap":
            binds = [part for path in _paths() for part in _bind(path)]
            options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
            # Its folder is the one place to write to: what bubblewrap puts into /dev has no bound.
            places = ["--dev", "/dev", "--remount-ro", "/dev", "--size", str(self.limits.disk_bytes)]
            return [_program("bwrap"), *options, *binds, *places, "--tmpfs", "/work", *launch]
        return launch

    def _job(self, program: str, folder: str, uid: int | None) -> dict[str, object]:
        limits, inside = self.limits, self.isolation == "namespaces"
        return {
            "program": program,
            "nonce": secrets.token_hex(16),
            "root": folder if inside else None,
            "paths": [*_paths(), *DEVICES] if inside else [],
            "folder": folder if self.isolation == "none" else "/work",
            "isolated": self.isolation != "none",
            "uid": uid,
            "drop_rights": uid is None and (inside or _is_root()),
            "wall_s": limits.wall_s,
            "disk_bytes": limits.disk_bytes,
            "limits": {
                "RLIMIT_CPU": limits.cpu_s,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_CORE": 0,
                # A user namespace counts what stands around the program too: the launcher, and bubblewrap's own.
                "RLIMIT_NPROC": limits.processes
                + {"bubblewrap": 2, "namespaces": int(uid is None), "none": 0}[self.isolation],
            },
        }


def make_sandbox(*, unsafe: bool = False) -> Sandbox:
    """The best isolation that works here.

    Args:
        unsafe: run without isolation where there is none.

    Raises:
        UsageError: if nothing isolates here and unsafe running is not consented to, or does not work either.
    """
    kind = isolation()
    if kind == "none" and not unsafe:
        raise UsageError(
            "generated code may only run isolated: by bubblewrap, or by Linux namespaces (util-linux unshare)",
            found="neither works here",
            remedy="install bubblewrap; or --unsafe-code, in a machine or container that may be lost",
        )
    sandbox = Sandbox(kind)
    if kind == "none" and not _works(sandbox):
        # Root gives every program a user of its own even here: nothing else would bound its processes.
        raise UsageError(
            "generated code must find the Python standard library", found=f"{sys.base_prefix} is closed to other users",
            remedy="run as an ordinary user, or with a Python that all users may read",
        )  # fmt: skip
    return sandbox


@lru_cache(maxsize=1)
def isolation() -> str:
    """`bubblewrap` or `namespaces`, whichever works here, else `none`; found out by running a program."""
    if sys.platform != "linux":
        return "none"
    candidates = ("bubblewrap", "namespaces") if _own_user() is None else ("namespaces",)
    for name in candidates:
        if _program("bwrap" if name == "bubblewrap" else "unshare") and _works(Sandbox(name)):
            return name
    return "none"


def _works(sandbox: Sandbox) -> bool:
    return sandbox.run("import math\nassert math.sqrt(4) == 2").passed


def _program(name: str) -> str:
    return shutil.which(name) or ""


def _paths() -> list[str]:
    """The system's and Python's own files, those that exist; where a link leads to Python, both it and its end."""
    prefixes = dict.fromkeys((os.path.realpath(sys.base_prefix), sys.base_prefix))
    outside = [python for python in prefixes if not any(Path(python).is_relative_to(path) for path in SYSTEM)]
    return [path for path in (*SYSTEM, *outside) if os.path.lexists(path)]


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _own_user() -> int | None:
    """A user for one program alone, which only root can give it; None where there is none to give."""
    return _spare_uid() if _is_root() else None


def _spare_uid() -> int | None:
    """A user that owns nothing, another one each time, so that the processes of each program are counted apart.

    None where the user namespace that we are in knows too few, as that of `unshare -r`, which knows root alone.
    """
    users, groups = _known_ids("uid_map"), _known_ids("gid_map")  # the program gets a group of the same number
    shared = [range(max(u.start, g.start), min(u.stop, g.stop)) for u in users for g in groups]
    widest = max(shared, key=len, default=range(0))
    if len(widest) < MANY_USERS:
        return None
    return widest.stop - 1024 - secrets.randbelow(len(widest) // 4)


def _known_ids(kind: str) -> list[range]:
    """The ids that our user namespace knows, as all lines of its map say."""
    try:
        lines = Path(f"/proc/self/{kind}").read_text(encoding="ascii").splitlines()
    except OSError:
        return [range(65536)]
    firsts = [(int(first), int(count)) for first, _, count in map(str.split, lines)]
    return [range(first, min(first + count, 1 << 31)) for first, count in firsts]


def _bind(path: str) -> list[str]:
    if os.path.islink(path):
        return ["--symlink", os.path.realpath(path), path]
    return ["--ro-bind", path, path]


def _python() -> Path:
    # A virtual environment's interpreter would bring its packages; programs get the standard library alone.
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


@lru_cache(maxsize=1)
def _launcher() -> str:
    return LAUNCHER.read_text(encoding="utf-8")
