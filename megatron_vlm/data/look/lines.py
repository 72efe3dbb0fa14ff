"""A segment's tokens in lines, each of which tells where it begins: the ruler of a long text."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.look.row_view import Span

FULL, MOST = 160, 240
"""Spans after which a line ends at the next space, and at the latest. Our choice."""


_STAMP = re.compile(r"\[[0-9]+\.[0-9] second\]\s*")
_LONGEST_STAMP = 24


@dataclass(frozen=True, slots=True)
class Line:
    """Spans whose tokens follow each other, in the row and in their positions."""

    first: int
    """Place of its first token within the row."""
    spans: list[Span]
    is_frame: bool = False
    """Whether it is a frame of a video, after its time if that stands before it."""


def lines_of(
    spans: Sequence[Span], positions: NDArray[np.int64], starts: Container[int]
) -> Iterator[Line]:
    """Cut spans into lines.

    Args:
        spans: of a segment, in order.
        positions: [seq_length] of the row's tokens. Where they do not go on, a line ends, so that
            the position of each token follows from its line's.
        starts: places in the row where a line begins in any case.
    """
    line: list[Span] = []
    for span in spans:
        jumps = line and positions[span.first] != positions[span.first - 1] + 1
        if line and (jumps or span.first in starts or len(line) >= MOST):
            yield Line(line[0].first, line)
            line = []
        if span.picture is not None and span.picture.pts is not None:
            stamp = _stamp(line)
            if line[:stamp]:
                yield Line(line[0].first, line[:stamp])
            shot = [*line[stamp:], span]
            yield Line(shot[0].first, shot, is_frame=True)
            line = []
            continue
        line.append(span)
        if len(line) >= FULL and span.text.endswith((" ", "\n")):
            yield Line(line[0].first, line)
            line = []
    if line:
        yield Line(line[0].first, line)


def _stamp(line: Sequence[Span]) -> int:
    """Where the time of a frame begins at the end of a line; the line's length if there is none."""
    text = ""
    for place in range(len(line) - 1, max(-1, len(line) - 1 - _LONGEST_STAMP), -1):
        text = line[place].text + text
        if _STAMP.fullmatch(text):
            return place
    return len(line)
