"""PDF files as a source: one entry for each file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_vlm.data.chat import Thinking
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.draft import Draft, Entry, SampleKind
from megatron_vlm.data.pdf.interleaved import interleaved_documents
from megatron_vlm.data.pdf.masked import masked_pages
from megatron_vlm.data.pdf.pool import require_library
from megatron_vlm.data.pdf.settings import MAX_PDF_BYTES, PdfSettings, check_mode
from megatron_vlm.errors import DataError


class PdfSource:
    """A PDF file, a folder of them (its folders included), or a list of both.

    A folder's files are those whose names end in `.pdf`, sorted by path. A file's name in its
    folder draws what is covered, so a folder can be moved.
    """

    kind: SampleKind
    origins: Sequence[str]
    total: int | None

    def __init__(
        self,
        paths: Path | Sequence[Path],
        mode: str,
        settings: PdfSettings | None = None,
        template: ChatTemplate | None = None,
        thinking: Thinking = "keep",
    ) -> None:
        """Find the files; none is read.

        Args:
            paths: a file, a folder, or several.
            mode: `masked` or `interleaved`.
            settings: null for the defaults.
            template: what writes the questions of `masked`; null: the built-in format.
            thinking: what the template is told.

        Raises:
            DataError: there is no such file, folder or mode, a folder without a PDF file, or no
                PDF library.
        """
        self._mode = check_mode(mode)
        require_library()
        self._settings = settings or PdfSettings()
        self._template, self._thinking = template, thinking
        given = [paths] if isinstance(paths, Path) else list(paths)
        self._files = [found for path in given for found in _files(path)]
        if not self._files:
            raise DataError("PDF source: an empty list of paths; name a file or a folder")
        self.kind = "conversation" if self._mode == "masked" else "document"
        self.origins = [name for _, name in self._files]
        self.total = len(self._files)

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """One entry for each file, from number `start` on."""
        for number in range(start, len(self._files)):
            path, name = self._files[number]
            yield Entry(number, number, name, partial(self._drafts, path, name))

    def _drafts(self, path: Path, name: str) -> list[Draft]:
        encoded = _read(path)
        if self._mode == "masked":
            return masked_pages(encoded, name, self._settings, self._template, self._thinking)
        return interleaved_documents(encoded, name, self._settings)


def _files(path: Path) -> list[tuple[Path, str]]:
    """The files that a path stands for, and the name of each."""
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected PDF files")
        return [(path, path.name)]

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error

    found = []
    for folder, _, names in os.walk(path, onerror=fail):
        found += [Path(folder, name) for name in names if name.lower().endswith(".pdf")]
    if not found:
        raise DataError(f"{path}: holds no file whose name ends in .pdf")
    named = [(file, file.relative_to(path).as_posix()) for file in found]
    return sorted(named, key=lambda pair: pair[1])


def _read(path: Path) -> bytes:
    try:
        # A pipe or a device would block or never end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: not a regular file; expected a PDF file")
            if status.st_size > MAX_PDF_BYTES:
                raise DataError(
                    f"{path}: {status.st_size} bytes; at most {MAX_PDF_BYTES} are read of a PDF"
                )
            encoded = file.read(status.st_size + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(encoded) != status.st_size:
        raise DataError(f"{path}: changed its size while it was read; build again")
    return encoded
