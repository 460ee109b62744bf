"""Progress on the terminal: a live line on a TTY, a line every few seconds elsewhere.

Takes stage names and counts; prints to stderr, so that stdout stays free for results.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 5.0
"""Between printed lines, at first; a long run prints one a minute."""
PLAIN_SLOWEST_S = 60.0
PLAIN_SHARE = 0.02
"""Of the time that has passed: the wait for the next line."""


class Reporter:
    """Shows what the run is doing."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._started = time.monotonic()

    def line(self, text: str) -> None:
        """One line, with the run's elapsed time."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        self.console.print(f"[dim]{minutes:3d}:{seconds:02d}[/] {text}", soft_wrap=True)

    @contextmanager
    def counter(self, name: str, total: int | None = None) -> Iterator["Counter"]:
        """A counter for one piece of work."""
        if not self.console.is_terminal:
            yield PlainCounter(self, name, total)
            return
        columns = (
            TextColumn("      [cyan]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield LiveCounter(progress, name, total)


class Counter:
    """Counts towards a total."""

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that `done` pieces are done."""
        raise NotImplementedError


class LiveCounter(Counter):
    """A progress bar."""

    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, note="")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, note=note)
        if total is not None:
            self._progress.update(self._task, total=total)


class PlainCounter(Counter):
    """A printed line every few seconds."""

    def __init__(self, reporter: Reporter, name: str, total: int | None) -> None:
        self._reporter, self._name, self._total = reporter, name, total
        self._started = self._last = time.monotonic()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Print, if the last line is old enough."""
        self._total = total or self._total
        now = time.monotonic()
        if now - self._last < plain_wait_s(now - self._started) and done != self._total:
            return
        self._last = now
        of = f"/{self._total}" if self._total else ""
        self._reporter.line(f"  {self._name} {done}{of} {note}".rstrip())
        sys.stderr.flush()


def plain_wait_s(elapsed_s: float) -> float:
    """Seconds between printed lines after so many: a file of a day's run stays readable."""
    return min(PLAIN_SLOWEST_S, max(PLAIN_EVERY_S, PLAIN_SHARE * elapsed_s))
