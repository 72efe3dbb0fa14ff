"""How far long work on a data set is: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from threading import Lock
from typing import Self

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


class WorkProgress(ABC):
    """Counts what is done of a whole, with the rate and, where it can be known, the time left."""

    verb: str
    """What is being done."""

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

    def start(self, done: int, total: int | None) -> Self:
        """Begin to count.

        Args:
            done: what was done before, which says nothing about the rate.
            total: the whole, if that is known.
        """
        self._done = self._first = done
        self._total = total
        self._began = self._told = time.monotonic()
        if self._shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
                _RateColumn(self),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task(self.verb, total=total, completed=done, count=self.count())
            self._bar.start()
        return self

    @abstractmethod
    def count(self) -> str:
        """How much is done, of how much."""

    @abstractmethod
    def pace(self, rate: float) -> str:
        """What a rate, in what is counted a second, is told as."""

    def _advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=amount, count=self.count())
            return
        now = time.monotonic()
        if self._shown and now - self._told >= _LINE_SECONDS:
            self._told = now
            self.tell(f"{self.verb}: {self.count()}, {self._speed(now)}")

    def __enter__(self) -> Self:
        """Itself; the bar ends with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self, now: float) -> str:
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        if self._total is None or not rate:
            return self.pace(rate)
        minutes = (self._total - self._done) / rate / 60
        return f"{self.pace(rate)}, {minutes:,.0f} minutes left"


class BuildProgress(WorkProgress):
    """Counts entries of a source, and tells the bytes written."""

    verb = "building"
    _bytes_written = 0

    def advance(self, bytes_written: int) -> None:
        """One entry more; `bytes_written` in all tars so far."""
        self._bytes_written = bytes_written
        self._advance(1)

    def count(self) -> str:
        """Entries and bytes."""
        total = "" if self._total is None else f" of {self._total:,}"
        return f"{self._done:,}{total} entries, {self._bytes_written / 1e9:,.2f} GB"

    def pace(self, rate: float) -> str:
        """Entries a second."""
        return f"{rate:,.1f} entries/s"


class ReadProgress(WorkProgress):
    """Counts bytes that are read, on any number of threads."""

    verb = "verifying"

    def __init__(self, shown: bool) -> None:
        """As `WorkProgress`."""
        super().__init__(shown)
        self._lock = Lock()

    def advance(self, bytes_read: int) -> None:
        """So many bytes more."""
        with self._lock:
            self._advance(bytes_read)

    def count(self) -> str:
        """Bytes."""
        return f"{self._done / 1e9:,.2f} of {(self._total or 0) / 1e9:,.2f} GB"

    def pace(self, rate: float) -> str:
        """Bytes a second."""
        return f"{rate / 1e6:,.0f} MB/s"


def printable(line: str, encoding: str | None) -> str:
    """The line with whatever is not printable, for this encoding too, escaped.

    It may hold anything that stands in a user's list or names a file, which could drive the
    terminal, or fail.
    """
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    encoding = encoding or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


class _RateColumn(ProgressColumn):
    """What is done in a second."""

    def __init__(self, work: WorkProgress) -> None:
        super().__init__()
        self._work = work

    def render(self, task: Task) -> Text:
        """The rate so far, once there is one."""
        rate = task.finished_speed or task.speed
        return Text(self._work.pace(rate) if rate else "-")
