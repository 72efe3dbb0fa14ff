"""What a person sees while a run goes on: rank files, log lines, a progress bar on a terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("megatron_vlm")


def open_logs(run_dir: Path, rank: int) -> None:
    """Log to `logs/rank_NNNNN.log`, and on rank 0 to the terminal too."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank_{rank:05d}.log")]
    if rank == 0:
        handlers.append(_Terminal())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Terminal(logging.StreamHandler):
    """Writes to whatever stdout is at the moment: the progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


class StepBar:
    """A progress bar over the run's steps, on rank 0 and on a terminal only."""

    def __init__(self, done: int, total: int, shown: bool) -> None:
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                # Lines above the bar where both share a terminal; a file keeps its lines.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._task = self._bar.add_task("steps", total=total, completed=done, rate="")

    def __enter__(self) -> StepBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def advance(self, step_seconds: float) -> None:
        """One step more, which took `step_seconds`."""
        if self._bar is not None:
            self._bar.update(
                self._task, advance=1, rate=f"{1 / max(step_seconds, 1e-9):.2f} steps/s"
            )

    def set_back(self, done: int) -> None:
        """The run stands at an earlier step again."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
