"""The progress bar of a build."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def build_progress(shown: bool) -> Progress:
    """A bar on standard error that counts samples, with their rate and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


class _RateColumn(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        """The rate so far, once there is one."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f} samples/s" if rate else "-")
