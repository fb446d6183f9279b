"""How a command ends that is interrupted, or whose output goes nowhere: one line, its own exit code, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Sends signals at the moment when a module is first looked for.
AT_IMPORT = """
import os, signal, sys

MODULE = sys.argv[1]

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), NUMBER)
            finally:
                for _ in range(AGAIN):
                    os.kill(os.getpid(), NUMBER)

sys.meta_path.insert(0, Strike())
from lorary.cli import main
sys.argv = ["lorary", "generate", "nowhere", "--prompt", "x"]
main()
"""


def take_interruptions() -> None:
    """A shell starts what it puts into the background with interruptions ignored, and that would be inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def struck(module: str, number: int = signal.SIGINT, again: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that a signal hits while it imports a module."""
    code = AT_IMPORT.replace("NUMBER", str(int(number))).replace("AGAIN", str(again))
    return subprocess.run(
        [sys.executable, "-c", code, module], capture_output=True, text=True, check=False, preexec_fn=take_interruptions
    )


@pytest.mark.parametrize("module", ["lorary.cli.ending", "lorary.cli.app", "typer", "numpy", "torch", "transformers"])
def test_an_interruption_while_modules_are_imported_is_one_line(module: str) -> None:
    done = struck(module)
    assert done.returncode == 130
    assert done.stderr == "interrupted: run the same command to go on from here\n"


def test_next_to_nothing_is_imported_before_interruptions_are_answered() -> None:
    code = "import sys; before = {*sys.modules}; import lorary.cli; print(*sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["lorary", "lorary.cli", "lorary.errors", "lorary.fetching", "lorary.version"]


def test_a_second_interruption_ends_it_where_it_stands() -> None:
    done = struck("typer", again=2)
    assert (done.returncode, done.stderr) == (130, "interrupted: run the same command to go on from here\n")


def test_a_command_that_is_terminated_says_so() -> None:
    done = struck("torch", signal.SIGTERM)
    assert (done.returncode, done.stderr) == (143, "terminated: run the same command to go on from here\n")


AT_THE_END = """
import os, signal, sys, threading
from lorary.cli import main
threading._register_atexit(lambda: os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["lorary", "--version"]
main()
"""

IN_A_FINALISER = """
import os, signal, sys
from lorary.cli import main

class Closed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            Closed()

sys.meta_path.insert(0, Strike())
sys.argv = ["lorary", "--version"]
main()
"""


IN_CODE_FROM_TEXT = """
import sys
from lorary.cli import app, main
app.app.command("say")(lambda: exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)"))
sys.argv = ["lorary", "say"]
main()
"""


@pytest.mark.parametrize("code", [IN_CODE_FROM_TEXT, AT_THE_END, IN_A_FINALISER])
def test_an_interruption_that_python_cannot_raise_is_one_line(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=take_interruptions
    )
    assert (done.returncode, done.stderr) == (130, "interrupted: run the same command to go on from here\n")


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    code = AT_IMPORT.replace("NUMBER", "2").replace("AGAIN", "0")
    done = subprocess.run(
        [sys.executable, "-c", code, "typer"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 1
    assert "nowhere must be a library" in done.stderr


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lorary", *arguments]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_stdout_is_said() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--version"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_stdout_that_nobody_reads_any_more_ends_it_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command("--version"), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_stdout_that_is_closed_prints_nothing() -> None:
    done = subprocess.run(
        command("library", "ls", "nowhere"), stderr=subprocess.PIPE, text=True, check=False,
        preexec_fn=lambda: os.close(1),
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere must be a library")
    done = subprocess.run(
        command("library", "--help"), stderr=subprocess.PIPE, text=True, check=False, preexec_fn=lambda: os.close(1)
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_characters_that_stdout_lacks_are_written_as_escapes() -> None:
    code = (
        "import sys\nfrom lorary.cli import app, main\n"
        "app.app.command('say')(lambda: print('\\u00e9 \\ud800'))\n"
        "sys.argv = ['lorary', 'say']\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9 \\ud800\n", "")
