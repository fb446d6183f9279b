"""Running commands."""

import signal
import sys
from collections.abc import Iterator

import pytest
from commands import Outcome, Run
from forked_server import forking


@pytest.fixture(scope="session")
def forking_place() -> Iterator[str]:
    """Where a process waits that forks commands off: the path of its socket."""
    with forking() as place:
        yield place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process: importing torch for each command would take most of the time."""

    def invoke(*arguments: object) -> Outcome:
        from lorary.cli import main

        monkeypatch.setattr(sys, "argv", ["lorary", *map(str, arguments)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        finally:  # a process that goes on needs its own again
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return invoke
