"""`lorary serve` in a process of its own that is forked off within milliseconds; to be ended by any signal."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
COMMANDS = Path(__file__).with_name("command_server.py")
END_S = 120.0


@contextmanager
def forking() -> Iterator[str]:
    """What forks commands off: the path of its socket, which must be short."""
    with tempfile.TemporaryDirectory(prefix="lorary-") as folder:
        place = f"{folder}/socket"
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        process = subprocess.Popen(
            [sys.executable, COMMANDS, place], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield place
        finally:
            process.kill()
            process.communicate()


class ForkedServer:
    """A server over a library.

    Args:
        place: of what forks it off.
        library: its folder.
        options: of the command.
    """

    def __init__(self, place: str, library: Path, *options: str) -> None:
        self._asking = subprocess.Popen(
            [sys.executable, "-I", "-S", COMMANDS, place, "lorary", "serve", library, "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "LORARY_ADMIN_TOKEN": "root"},
        )  # fmt: skip
        assert self._asking.stdout is not None
        line = self._asking.stdout.readline()
        found = re.search(r"serving \S+ at (http://127\.0\.0\.1:(\d+))", line)
        assert found, line + self._asking.communicate()[1]
        self.url = found[1]
        self._process = _listener(int(found[2]))

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for its end: the exit code, negative for a signal, and what it wrote to stderr."""
        errors = self._asking.communicate(timeout=END_S)[1]
        return (self._asking.returncode + 128) % 256 - 128, errors

    def close(self) -> None:
        """End it if it lives."""
        if self._asking.poll() is None:
            if self._process.is_running():
                self._process.kill()
            self._asking.communicate(timeout=END_S)


def _listener(port: int) -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return process
    raise AssertionError(f"nobody listens on {port}")
