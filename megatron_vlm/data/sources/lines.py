"""Where the lines of a file lie, found in one pass that holds a piece of the file at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_vlm.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""Longest line that is read; one holds a whole entry, pictures as base64 included. Our choice: the
values that it spells may take twenty times its bytes."""

_PIECE_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"


class Line(NamedTuple):
    """A line that holds more than white space, without its line break."""

    number: int
    """Counted from 1, blank lines included, as editors do."""
    offset: int
    """Bytes before it."""
    size: int
    """Its bytes; may be beyond `MAX_LINE_BYTES`."""


def find_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, of any length, in bounded memory.

    A byte order mark at the start belongs to no line; `\\r` before `\\n` belongs to the line break.

    Raises:
        DataError: the file cannot be read, on the way too.
    """
    try:
        with path.open("rb") as file:
            start = position = len(_BYTE_ORDER_MARK) if file.read(3) == _BYTE_ORDER_MARK else 0
            file.seek(position)
            number, blank, last = 1, True, 0
            while piece := file.read(_PIECE_BYTES):
                done = 0
                while (end := piece.find(b"\n", done)) >= 0:
                    if end > done:
                        blank = blank and _is_blank(piece, done, end)
                        last = piece[end - 1]
                    if not blank:
                        size = position + end - start
                        yield Line(number, start, size - (last == 0x0D))
                    number, blank, last = number + 1, True, 0
                    done = end + 1
                    start = position + done
                if done < len(piece):
                    blank = blank and _is_blank(piece, done, len(piece))
                    last = piece[-1]
                position += len(piece)
            if not blank:
                yield Line(number, start, position - start - (last == 0x0D))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _is_blank(piece: bytes, start: int, end: int) -> bool:
    # The first byte settles it for almost every line, without a copy of the rest.
    return piece[start] in _BLANK and not piece[start:end].strip(_BLANK)


def find_paragraphs(path: Path) -> Iterator[Line]:
    """Runs of lines that blank lines part, each as one `Line` that begins where its first does.

    Raises:
        DataError: as `find_lines`.
    """
    run: Line | None = None
    previous = 0
    for line in find_lines(path):
        if run is not None and line.number == previous + 1:
            run = Line(run.number, run.offset, line.offset + line.size - run.offset)
        else:
            if run is not None:
                yield run
            run = line
        previous = line.number
    if run is not None:
        yield run
