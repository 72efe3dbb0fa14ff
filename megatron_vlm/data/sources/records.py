"""Files of records (JSON lists, JSON lines, Parquet rows) as one numbered sequence of entries.

What a record means is not known here: each form gives a function that turns one into drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_vlm.data.draft import Draft, Entry, SampleKind
from megatron_vlm.data.sources.byte_ranges import ByteRange, files_below, names_of
from megatron_vlm.data.sources.lines import MAX_LINE_BYTES, Line, find_lines
from megatron_vlm.data.sources.parquet import ParquetRows
from megatron_vlm.data.sources.strict_json import parse_json
from megatron_vlm.errors import DataError

RECORD_EXTENSIONS = (".json", ".jsonl", ".ndjson", ".parquet")
"""Files that are taken for records."""

_LINES_EXTENSIONS = (".jsonl", ".ndjson")

ToDrafts = Callable[[Any], Sequence[Draft]]
"""Turns a record into its samples. Raises DataError with the reason why it cannot."""


class Record(NamedTuple):
    """One record; not read yet where that can be put off."""

    place: str
    """Where in its file, for messages; empty where the number of the entry says it all."""
    id: Any
    load: Callable[[], Any]
    """Raises DataError."""


class RecordFile(Protocol):
    """A file of records in a fixed order."""

    @property
    def count(self) -> int | None:
        """Records, if that is known before all are read."""
        ...

    def records(self, start: int) -> Iterator[Record]:
        """Records from number `start` on.

        Raises:
            DataError: the file cannot be read any further.
        """
        ...


class RecordSource:
    """The records of one or more files, read as one form: a `draft.Source`."""

    def __init__(
        self,
        kind: SampleKind,
        files: Sequence[RecordFile],
        names: Sequence[str],
        to_drafts: ToDrafts,
    ) -> None:
        """Put files together.

        Args:
            kind: of the samples.
            files: in order.
            names: of each, for `origins` and for errors.
            to_drafts: the form; called on worker threads.
        """
        self.kind: SampleKind = kind
        self.origins: Sequence[str] = tuple(names)
        self._files = tuple(files)
        self._to_drafts = to_drafts
        self._counts: dict[int, int] = {
            place: file.count for place, file in enumerate(files) if file.count is not None
        }
        all_known = len(self._counts) == len(self._files)
        self.total: int | None = sum(self._counts.values()) if all_known else None

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """As `draft.Source.entries`."""
        number = 0
        for origin, file in enumerate(self._files):
            first, count = number, self._counts.get(origin)
            # Where it is not known how many there are, they have to be passed one by one.
            skipped = min(count or 0, max(0, start - number))
            number += skipped
            for record in file.records(skipped):
                if number >= start:
                    drafts = partial(self._drafts, self.origins[origin], record)
                    yield Entry(number, origin, record.id, drafts)
                number += 1
            self._counts[origin] = number - first

    def _drafts(self, name: str, record: Record) -> Sequence[Draft]:
        try:
            return self._to_drafts(record.load())
        except RecursionError as error:
            raise DataError(f"{name} {record.place}: nested too deeply; flatten it") from error
        except DataError as error:
            if not record.place:
                raise
            raise DataError(f"{name} {record.place}: {error}") from error


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file with one JSON value a line; blank lines are passed over."""

    path: Path
    count: int | None = None

    def records(self, start: int) -> Iterator[Record]:
        """As `RecordFile.records`."""
        for number, line in enumerate(find_lines(self.path)):
            if number >= start:
                yield Record(f"line {line.number}", None, partial(_read_line, self.path, line))


@dataclass(frozen=True, slots=True)
class JsonList:
    """A file that is one JSON list; held whole, as JSON can be read in no other way."""

    values: Sequence[Any]
    named: bool
    """True where an entry's number does not tell its place: the list is one of several files."""

    @property
    def count(self) -> int:
        """Its length."""
        return len(self.values)

    def records(self, start: int) -> Iterator[Record]:
        """As `RecordFile.records`."""
        for number in range(start, len(self.values)):
            value = self.values[number]
            place = f"entry {number}" if self.named else ""
            given = value.get("id") if isinstance(value, dict) else None
            yield Record(place, given, partial(self.values.__getitem__, number))


def open_records(path: Path, expected: str) -> tuple[list[RecordFile], list[str]]:
    """The record files that a path stands for, and what they are called.

    Args:
        path: a file, or a folder of files.
        expected: what an entry should be, for messages.

    Raises:
        DataError: nothing there, unreadable, a JSON file that is neither a list nor lines, or
            Parquet without the library that reads it.
    """
    files = files_below(path, RECORD_EXTENSIONS, expected)
    opened = [_open(file, expected, named=len(files) > 1) for file in files]
    return opened, names_of(path, files)


def _open(path: Path, expected: str, named: bool) -> RecordFile:
    if path.suffix.lower() == ".parquet":
        return ParquetFile(ParquetRows(path))
    if first_byte(path) != b"[" or path.suffix.lower() in _LINES_EXTENSIONS:
        return JsonLines(path)
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    if not values:
        raise DataError(f"{path}: holds an empty list; expected a list of {expected}")
    return JsonList(values, named)


@dataclass(frozen=True, slots=True)
class ParquetFile:
    """The rows of a Parquet file."""

    rows: ParquetRows

    @property
    def count(self) -> int:
        """Rows."""
        return self.rows.count

    def records(self, start: int) -> Iterator[Record]:
        """As `RecordFile.records`."""
        for number, row in enumerate(self.rows.read(start), start):
            given = row.get("id") if isinstance(row, dict) else None
            yield Record(f"row {number}", given, partial(_good, row))


def first_byte(path: Path) -> bytes:
    """The first byte of a file that is neither white space nor a byte order mark.

    Raises:
        DataError: unreadable, or nothing but white space.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            while not head and (piece := file.read(1 << 20)):
                head = piece.lstrip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not head:
        raise DataError(f"{path}: is empty")
    return head[:1]


def _read_line(path: Path, line: Line) -> Any:
    if line.size > MAX_LINE_BYTES:
        raise DataError(
            f"{line.size} bytes long; at most {MAX_LINE_BYTES} are read, so split the entry or "
            "name its pictures by path"
        )
    return parse_json(ByteRange(path, line.offset, line.size, "line").read())


def _good(row: dict[str, Any] | DataError) -> Any:
    if isinstance(row, DataError):
        raise row
    return row
