"""Plain text as documents: `.txt` files, or JSON lines with a text field. All of it is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.draft import Draft
from megatron_vlm.data.sources.byte_ranges import ByteRange, files_below, names_of
from megatron_vlm.data.sources.documents import document_draft
from megatron_vlm.data.sources.lines import MAX_LINE_BYTES, Line, find_lines, find_paragraphs
from megatron_vlm.data.sources.media import entry_json
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.records import Record, RecordSource, open_records
from megatron_vlm.data.sources.strict_json import write_json
from megatron_vlm.errors import DataError

_UNITS: dict[str, Callable[[Path], Iterator[Line]]] = {
    "line": find_lines,
    "paragraph": find_paragraphs,
}


def open_text(path: Path, options: SourceOptions) -> RecordSource:
    """`.txt` files as documents, split as `options.text_unit` says.

    Args:
        path: a file, or a folder of `.txt` files.
        options: `text_unit`.

    Raises:
        DataError: nothing there.
    """
    files = files_below(path, [".txt"], "plain text")
    names = names_of(path, files)
    opened = [
        _TextFile(file, name, options.text_unit) for file, name in zip(files, names, strict=True)
    ]
    return RecordSource("document", opened, names, _same)


def open_text_lines(path: Path, options: SourceOptions) -> RecordSource:
    """JSON lines (or a JSON list, or Parquet) whose entries hold a document each.

    Args:
        path: a file, or a folder of such files.
        options: `text_field`.

    Raises:
        DataError: nothing there, or unreadable.
    """
    expected = f'{{"{options.text_field}": ...}}'
    files, names = open_records(path, expected)
    return RecordSource("document", files, names, partial(_text_drafts, options.text_field))


@dataclass(frozen=True, slots=True)
class _TextFile:
    """A file of plain text, as `records.RecordFile`: its records are drafts already."""

    path: Path
    name: str
    unit: str

    @property
    def count(self) -> int | None:
        return 1 if self.unit == "file" else None

    def records(self, start: int) -> Iterator[Record]:
        if self.unit == "file":
            if start == 0:
                yield Record("", self.name, self._whole)
            return
        for number, line in enumerate(_UNITS[self.unit](self.path)):
            if number >= start:
                yield Record(f"line {line.number}", None, partial(self._read, line))

    def _whole(self) -> Sequence[Draft]:
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror})") from error
        try:
            return self._read(Line(1, 0, size))
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from error

    def _read(self, line: Line) -> Sequence[Draft]:
        if line.size > MAX_LINE_BYTES:
            raise DataError(
                f"{line.size} bytes of text; at most {MAX_LINE_BYTES} make one document, so split "
                "it"
            )
        encoded = ByteRange(self.path, line.offset, line.size, "text").read()
        try:
            # A byte order mark is no part of the text.
            text = encoded.decode("utf-8-sig" if line.offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 at byte {line.offset + error.start}; write it again as UTF-8"
            ) from error
        entry = {"file": self.name} if self.unit == "file" else {"line": line.number}
        return [document_draft([text], write_json(entry))]


def _same(drafts: Any) -> Sequence[Draft]:
    result: Sequence[Draft] = drafts
    return result


def _text_drafts(text_field: str, value: Any) -> Sequence[Draft]:
    if not isinstance(value, dict):
        raise DataError(f"entry is {type(value).__name__}; expected an object")
    text = value.get(text_field)
    if not isinstance(text, str):
        found = type(text).__name__ if text_field in value else "missing"
        raise DataError(f"{text_field}: is {found}; expected a string")
    # The text is in the sample; what is kept beside it is the rest.
    rest = {key: item for key, item in value.items() if key != text_field}
    return [document_draft([text], entry_json(rest))]
