"""SIGTERM, SIGUSR1 and Ctrl-C ask for a save and a clean end, on all ranks after the same step."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that this process was asked to stop; a context manager around the loop."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                # Asked for the second time: at once.
                raise KeyboardInterrupt
            print("mvlm: saving and leaving; Ctrl-C again ends at once", file=sys.stderr)
        self.received = number
