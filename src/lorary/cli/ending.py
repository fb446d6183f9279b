"""How a signal ends the command: the first unwinds it, so that it cleans up; another one ends it where it stands.

What a command leaves is whole and resumable whenever it is killed, so the second may be as rude as it likes. Nothing
heavy is imported here: this must be in force before anything that takes time.
"""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

# What shells give a command that a signal ended.
CODES = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Ending:
    """The handler of the signals that end the command, and the first that came.

    Args:
        signal_number: the first signal that came, None before it.
        is_over: whether there is nothing left to unwind.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.is_over = False
        self._is_said = False
        self._unraisable = sys.unraisablehook

    def watch(self) -> None:
        """Handle the signals from now on; one that our caller ignores, as `nohup` does, stays ignored."""
        if threading.current_thread() is not threading.main_thread():  # which alone may
            return
        for number in CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        sys.unraisablehook = self._end_unraisable
        # Registered first, so run last: behind it Python gives signals up, and one more would spoil the exit code.
        atexit.register(_ignore)

    @property
    def code(self) -> int | None:
        """The exit code that the first signal asks for; None where none came."""
        return None if self.signal_number is None else CODES[signal.Signals(self.signal_number)]

    def say(self) -> None:
        """Say on stderr, once, what ended the command."""
        if line := self._line():
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)

    def _line(self) -> str:
        """What there is left to say."""
        if self._is_said:
            return ""
        self._is_said = True
        return f"{WORDS[signal.Signals(self.signal_number or signal.SIGINT)]}: run the same command to go on from here"

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None or self.is_over:
            self.signal_number = self.signal_number or number
            self._end_at_once()
        self.signal_number = number
        raise KeyboardInterrupt

    def _end_at_once(self) -> None:
        if line := self._line():
            with suppress(OSError):  # past Python's buffers, which the signal may have caught in the midst of a write
                os.write(2, f"{line}\n".encode())
        os._exit(self.code or 1)

    def _end_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """A signal that came where Python cannot raise it (in a finaliser) would be printed there and forgotten."""
        if self.signal_number is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._end_at_once()
        self._unraisable(unraisable)


def _ignore() -> None:
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)
