"""How far a build is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_SECONDS = 30.0
"""Between two lines where there is no terminal. Our choice."""


class BuildProgress:
    """Counts entries and written bytes, with the rate and, where it can be known, the time left."""

    def __init__(self, shown: bool) -> None:
        """Show nothing yet; with `shown` false, nothing ever."""
        self._shown = shown
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._done = 0
        self._first = 0
        self._total: int | None = None
        self._began = self._told = time.monotonic()

    def tell(self, line: str) -> None:
        """Print a line on standard error."""
        if self._shown:
            print(printable(line, sys.stderr.encoding), file=sys.stderr)

    def start(self, done: int, total: int | None) -> BuildProgress:
        """Begin to count.

        Args:
            done: entries that an earlier build has written.
            total: entries in all, if that is known.
        """
        self._done = self._first = done
        self._total = total
        self._began = self._told = time.monotonic()
        if self._shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                _RateColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task("building", total=total, completed=done, count=self._count(0))
            self._bar.start()
        return self

    def advance(self, bytes_written: int) -> None:
        """One entry more; `bytes_written` in all tars so far."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, count=self._count(bytes_written))
            return
        now = time.monotonic()
        if self._shown and now - self._told >= _LINE_SECONDS:
            self._told = now
            self.tell(f"building: {self._count(bytes_written)}, {self._pace(now)}")

    def __enter__(self) -> BuildProgress:
        """Itself; the bar ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _count(self, bytes_written: int) -> str:
        total = "" if self._total is None else f" of {self._total:,}"
        return f"{self._done:,}{total} entries, {bytes_written / 1e9:,.2f} GB"

    def _pace(self, now: float) -> str:
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        if self._total is None or not rate:
            return f"{rate:,.1f} entries/s"
        minutes = (self._total - self._done) / rate / 60
        return f"{rate:,.1f} entries/s, {minutes:,.0f} minutes left"


def printable(line: str, encoding: str | None) -> str:
    """The line with whatever is not printable, for this encoding too, escaped.

    It may hold anything that stands in a user's list or names a file, which could drive the
    terminal, or fail.
    """
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    encoding = encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


class _RateColumn(ProgressColumn):
    """Entries a second."""

    def render(self, task: Task) -> Text:
        """The rate so far, once there is one."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f}/s" if rate else "-")
