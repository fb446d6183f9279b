"""Runs one program under limits and says whether it reached its end: the first process inside a sandbox.

Started by `lorary.evaluate.sandbox` as `python -I -S -c TEXT`, with this file as the text: it imports the standard
library alone. The job comes as JSON on stdin, the verdict goes as JSON to stdout. The program runs in a child that has
neither: its stdin, stdout and stderr are /dev/null.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time
from contextlib import suppress
from typing import Any

# Constants of Linux: mount(2), mount_setattr(2) (Linux 5.12; one number on every architecture), prctl(2), capset(2).
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 4096, 16384
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
READ_ONLY = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 24, 36, 38
CAPABILITY_VERSION = 0x20080522
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, KEYCTL, JOIN_SESSION_KEYRING = 22, 2, "keyctl", 1
LIBC = ctypes.CDLL(None, use_errno=True)
# System calls through which a program could reach or leave what no namespace or limit of memory covers: keys of the
# kernel, shared memory and other objects outside of files, and ways around this very filter. By machine, with the
# number that the kernel knows the machine by.
FORBIDDEN: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "add_key": 248, "request_key": 249, KEYCTL: 250, "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64,
            "msgget": 68, "mq_open": 240, "mq_unlink": 241, "memfd_create": 319, "memfd_secret": 447, "bpf": 321,
            "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "add_key": 217, "request_key": 218, KEYCTL: 219, "shmget": 194, "shmctl": 195, "shmat": 196, "semget": 190,
            "msgget": 186, "mq_open": 180, "mq_unlink": 181, "memfd_create": 279, "memfd_secret": 447, "bpf": 280,
            "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425,
        },
    ),
}  # fmt: skip
IS_LINUX = sys.platform == "linux"
# Most bytes that are read of what a program reports.
MOST_OUTPUT = 65536


def main() -> None:
    """Read the job, run it in a child, print the verdict."""
    job = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    if IS_LINUX:
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if job["root"] is not None:
        make_root(job["root"], job["paths"], job["disk_bytes"])
    os.chdir(job["folder"])
    if job["uid"] is not None:
        os.chown(".", job["uid"], job["uid"])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.closerange(3, writing)
        os.closerange(writing + 1, 65536)
        run(job, writing)
        os._exit(0)
    os.close(writing)
    verdict = watch(child, reading, job)
    if not job["isolated"]:  # a process namespace ends with its first process, and all in it
        end_children(child)
    os.write(1, json.dumps(verdict).encode())


def run(job: dict[str, Any], writing: int) -> None:
    """The child: gives up its rights, then executes the program and reports."""
    os.setsid()
    lower_rights(job["uid"], job["drop_rights"])
    for name, value in job["limits"].items():
        if name == "RLIMIT_NPROC" and not job["isolated"] and job["uid"] is None:
            value += num_tasks(os.getuid())
        limit(name, value)
    program, nonce, error, pid = job.pop("program"), job.pop("nonce"), None, os.getpid()
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"[:500]
    if os.getpid() == pid:  # what the program forked comes here too
        os.write(writing, json.dumps({"nonce": nonce, "error": error}).encode())


def limit(name: str, value: int) -> None:
    """Set a limit, hard, where the system knows it; a stricter one stays."""
    number = getattr(resource, name, None)
    if number is not None:
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))


def lower_rights(uid: int | None, drop: bool) -> None:
    """Another user where we are root, no capabilities where we are root of a user namespace, and no way back."""
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    if drop:
        for capability in range(64):
            LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        check(LIBC.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()), "capset")
    if IS_LINUX:
        LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        forbid_calls()


def forbid_calls() -> None:
    """Let the calls of `FORBIDDEN` fail as not permitted, and all calls of another machine's kind (32 bits).

    Where the kernel has no such filter, the program at least gets a session keyring of its own.
    """
    if os.uname().machine not in FORBIDDEN or ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    machine, calls = FORBIDDEN[os.uname().machine]
    LIBC.syscall(calls[KEYCTL], JOIN_SESSION_KEYRING, None)
    numbers = sorted(calls.values())
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # of classic BPF
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    rules = [(load, 0, 0, 4), (equal, 0, len(numbers) + 3, machine), (load, 0, 0, 0)]
    rules.append((at_least, len(numbers) + 1, 0, 0x40000000))  # x32, which has numbers of its own
    rules += [(equal, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    rules += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    described = ctypes.create_string_buffer(struct.pack("HL", len(rules), ctypes.addressof(program)))
    LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, described, 0, 0)


def make_root(root: str, paths: list[str], disk_bytes: int) -> None:
    """A file system of its own: what Python needs, read-only, and an empty folder of bounded size in memory."""
    mount_memory(root, 1 << 20)
    for path in paths:
        inside = root + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.path.realpath(path), inside)  # the end of the link: one in between may not be inside
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
        check(LIBC.mount(path.encode(), inside.encode(), None, MS_BIND | MS_REC, None), path)
        if not path.startswith("/dev/"):
            set_read_only(inside, AT_RECURSIVE)
    mount_memory(f"{root}/work", disk_bytes)
    set_read_only(root, 0)
    os.chroot(root)


def mount_memory(path: str, size: int) -> None:
    """Mount an empty file system in memory, of so many bytes at most."""
    os.makedirs(path, exist_ok=True)
    options = f"size={size},mode=755".encode()
    check(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), path)


def set_read_only(path: str, depth: int) -> None:
    """Forbid writing through a mount, and with AT_RECURSIVE through all below it."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    check(LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), depth, attributes, size), path)


def check(result: int, call: str) -> None:
    """Raise what the C library reports."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), call)


def watch(child: int, reading: int, job: dict[str, Any]) -> dict[str, str]:
    """Wait for the child or the end of its time; what it wrote counts only with the nonce."""
    deadline = time.monotonic() + job["wall_s"]
    # Polled: other processes may hold the pipe too, so that its end says nothing about the child.
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() >= deadline:
            return {"status": "timeout", "detail": f"{job['wall_s']} s of wall time"}
        time.sleep(0.002)
    os.set_blocking(reading, False)
    output = b""
    with suppress(BlockingIOError):
        output = os.read(reading, MOST_OUTPUT)
    return judge(ended[1], output, job["nonce"])


def judge(status: int, output: bytes, nonce: str) -> dict[str, str]:
    """The verdict on a child that ended."""
    if os.WIFSIGNALED(status):
        return {"status": "killed", "detail": signal.Signals(os.WTERMSIG(status)).name}
    try:
        report = json.loads(output)
        is_ours = report["nonce"] == nonce
    except (ValueError, TypeError, KeyError):
        is_ours = False
    if not is_ours:
        return {"status": "failed", "detail": "it ended before its tests did"}
    if report["error"] is not None:
        return {"status": "failed", "detail": report["error"]}
    return {"status": "passed", "detail": ""}


def end_children(child: int) -> None:
    """Kill the child's group, and whatever it left: orphans come to the subreaper, which we are."""
    for _ in range(1000):
        with suppress(OSError):
            os.killpg(child, signal.SIGKILL)
        for pid in children():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def num_tasks(uid: int) -> int:
    """Threads that a user runs already: without a namespace or a user of its own, they count as the program's."""
    count = 0
    for pid in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with suppress(OSError):
            if pid.isdigit() and os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
    return count


def children() -> list[int]:
    """Processes whose parent we are, those of dead parents too."""
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
    return []


if __name__ == "__main__":
    main()
