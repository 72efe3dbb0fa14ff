"""Packed rows, and places between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The samples of one row, in order; what they leave free at the end is filler."""

    number: int
    """Place among the rows of the run; -1 for a row of filler alone."""
    source: NDArray[np.int32]
    """[samples] number of the source of each."""
    sample: NDArray[np.int64]
    """[samples] number of each in its data set."""
    offset: NDArray[np.int32]
    """[samples] first of its tokens that the row holds; 0 but for later parts of long samples."""
    start: NDArray[np.int32]
    """[samples] first token within the row."""
    length: NDArray[np.int32]
    """[samples] real tokens, pictures at their full number."""
    padded: NDArray[np.int32]
    """[samples] tokens up to the next: `length` rounded up to `pad_multiple`; of an untied row only
    the last is."""
    untied: bool = False
    """Whether its samples are one segment, cut into chunks and shuffled (`data.untie`)."""


@dataclass(frozen=True, slots=True)
class Window:
    """Where a window starts."""

    phase: int
    """Place in the schedule."""
    rows: int
    """Rows of the run before it."""
    tokens: int
    """Real tokens drawn before it."""
    bases: tuple[int, ...]
    """Items of each source that were drawn before the phase."""
    drawn: tuple[int, ...]
    """Items of each source that were drawn before the window."""
    waiting: tuple[tuple[int, int, int, int], ...] = ()
    """(source, sample, offset, length) of what the windows before had no room for, in order."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place between two rows of a run."""

    window: Window
    """The window that the next row lies in."""
    row: int = 0
    """Rows of it that are consumed."""

    @property
    def rows(self) -> int:
        """Rows of the run that are consumed."""
        return self.window.rows + self.row

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        window = self.window
        return {
            "row_of_window": self.row,
            "rows_before_window": window.rows,
            "phase": window.phase,
            "tokens_drawn": window.tokens,
            "phase_bases": list(window.bases),
            "drawn": list(window.drawn),
            "waiting": [list(piece) for piece in window.waiting],
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Cursor:
        """From what `as_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        waiting = []
        for source, sample, offset, length in state["waiting"]:
            waiting.append((int(source), int(sample), int(offset), int(length)))
        window = Window(
            int(state["phase"]),
            int(state["rows_before_window"]),
            int(state["tokens_drawn"]),
            tuple(int(n) for n in state["phase_bases"]),
            tuple(int(n) for n in state["drawn"]),
            tuple(waiting),
        )
        return cls(window, int(state["row_of_window"]))
