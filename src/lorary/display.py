"""Progress for long work: bars with the time left in a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from lorary.terminal import unescaped, writable

# Seconds between two lines where stderr is not a terminal.
LINE_EVERY_S = 10.0
# Seconds over which a bar averages its speed: single steps may take longer than rich's own half minute.
SPEED_OVER_S = 600.0


class PrintableConsole(Console):
    """A console that writes out the control characters of what it shows, and colours as it likes."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The pieces of what is shown."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(writable(segment.text), segment.style)


def table_console() -> Console:
    """Where tables are printed: as wide as the terminal, or 120 columns elsewhere."""
    stream = unescaped(sys.stdout)
    return PrintableConsole(file=stream, width=None if Console(file=stream).is_terminal else 120)


class Bar:
    """One stretch of work. Made by `Display.bar`."""

    def __init__(self, title: str, total: int, progress: Progress | None, console: Console) -> None:
        self._title, self._total, self._done, self._console = title, total, 0, console
        # Where the count begins: what an earlier run had done took this one no time, nor does what comes before the
        # first unit say how long a unit takes.
        self._first: int | None = None
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="") if progress else None
        self._started = self._spoke = time.monotonic()

    def advance_to(self, done: int, note: str = "") -> None:
        """Say how far the work has come.

        Args:
            done: units done so far.
            note: a word on the last unit (a loss, a name).
        """
        self._done = done
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = done, now
            if self._progress is not None and self._task is not None:
                self._progress.reset(self._task, completed=done)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
            return
        if done == self._total or now - self._spoke >= LINE_EVERY_S:
            self._spoke = now
            since = done - self._first
            left = f", {(now - self._started) / since * (self._total - done):.0f} s left" if since else ""
            line = f"{self._title}: {done}/{self._total}{left} {note}"
            self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line, above the bar in a terminal."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def spare(self, units: int) -> None:
        """So many units need not be done after all."""
        self._total -= units
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=self._total)

    def advance(self, note: str = "") -> None:
        """One more unit is done."""
        self.advance_to(self._done + 1, note)

    def remove(self) -> None:
        """Take the bar away from a terminal; what was printed elsewhere stays."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)


class Display:
    """Writes to stderr, so that stdout holds results only."""

    # What a terminal shows now: a bar inside of another one is a line of it.
    _shown: ClassVar[Progress | None] = None

    def __init__(self) -> None:
        self.console = PrintableConsole(file=unescaped(sys.stderr))

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar for work of known size; it goes below one that is shown already.

        Args:
            title: what is being done.
            total: units of work.

        Yields:
            The bar.
        """
        if not self.console.is_terminal:
            yield Bar(title, total, None, self.console)
            return
        if (shown := Display._shown) is not None:
            inner = Bar(title, total, shown, self.console)
            try:
                yield inner
            finally:
                inner.remove()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console, speed_estimate_period=SPEED_OVER_S) as progress:
            Display._shown = progress
            try:
                yield Bar(title, total, progress, self.console)
            finally:
                Display._shown = None
