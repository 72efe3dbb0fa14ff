"""Bytes of a file that are read when they are wanted, and which files a path stands for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.errors import DataError

_MOST_AT_ONCE = 2**30
"""Bytes asked of the system in one call, which gives no more than 2 GiB."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A run of bytes of a file. The file is open only while it is read."""

    path: Path
    offset: int
    size: int
    name: str
    """What errors call it."""

    def read(self) -> bytes:
        """The bytes.

        Raises:
            DataError: the file cannot be read, or no longer reaches that far.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._read(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read ({error.strerror})") from error

    def _read(self, descriptor: int) -> bytes:
        pieces = []
        done = 0
        while done < self.size:
            wanted = min(self.size - done, _MOST_AT_ONCE)
            piece = os.pread(descriptor, wanted, self.offset + done)
            if not piece:
                raise DataError(f"{self.name}: became shorter while it was read; build again")
            pieces.append(piece)
            done += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def files_below(path: Path, extensions: Sequence[str], what: str) -> list[Path]:
    """The file itself, or a folder's files with these extensions in the order of their names.

    Subfolders are looked through, hidden files and folders passed over. A file that is given by
    itself may have any extension.

    Args:
        path: a file or a folder.
        extensions: lower case, with the dot.
        what: what errors say was expected.

    Raises:
        DataError: nothing there, or no such file in the folder.
    """
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            found = _walk(path, tuple(extensions))
            if not found:
                raise DataError(
                    f"{path}: holds no file with {' or '.join(extensions)}; expected {what}"
                )
            return found
        found_there = "is neither a file nor a folder" if path.exists() else "does not exist"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected {what}") from error
    raise DataError(f"{path}: {found_there}; expected {what}")


def names_of(path: Path, files: Sequence[Path]) -> list[str]:
    """What the files below `path` are called: relative to it, so that moving it changes nothing."""
    if path.is_dir():
        return [file.relative_to(path).as_posix() for file in files]
    return [file.name for file in files]


def shortened(value: Any) -> str:
    """A name as errors quote it; the type of what is no text."""
    if not isinstance(value, str):
        return type(value).__name__
    return repr(value if len(value) <= 120 else value[:117] + "...")


def _walk(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name)
            for name in names
            if name.lower().endswith(extensions) and not name.startswith(".")
        ]
    return sorted(file for file in found if file.is_file())
