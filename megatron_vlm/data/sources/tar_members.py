"""The members of a tar by offset, from its headers alone, and damage named instead of passed over.

Python's `tarfile` takes a damaged header in the middle of an archive for its end, holds all members
that it has seen, and reads extended headers of any size into memory. Here every header's checksum
is checked, an archive without an end mark is cut off, and memory is bounded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_vlm.errors import DataError

_BLOCK = 512
_MAX_EXTENDED = 2**20
"""Most bytes of an extended header, which holds little but a name. Our choice."""
_MAX_NAME = 4096
"""Longest name that Linux could unpack."""

_FILES = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, pipes: their size says nothing of the bytes that follow."""

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class CutOff(DataError):
    """A member that the file ends within; its header is whole."""

    def __init__(self, message: str, name: str) -> None:
        """Remember which member it is."""
        super().__init__(message)
        self.name = name


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    """Of its first byte, in the tar."""
    size: int


def tar_members(path: Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar (ustar, pax or GNU), in order.

    Raises:
        DataError: the file cannot be read, is no tar, or is damaged; names it and the byte. What
            lies before the damage has been given.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield from _Walk(path, descriptor).members()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class _Walk:
    """One pass over the headers of one open tar."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._end = os.fstat(descriptor).st_size
        self._at = 0
        self._header_at = 0

    def members(self) -> Iterator[Member]:
        long_name: str | None = None
        fields: dict[bytes, bytes] = {}
        while (header := self._header()) is not None:
            kind = header[156:157]
            size = self._number(header[124:136], "size")
            if kind in (b"x", b"g"):
                found = self._pax(self._extended(size))
                if kind == b"x":
                    fields = found
                elif found.keys() & {b"path", b"size"}:
                    raise self._damage("a global header that renames members")
                continue
            if kind in (b"L", b"K"):
                content = self._extended(size)
                if kind == b"L":
                    long_name = _text(content.split(b"\0", 1)[0])
                continue
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in fields):
                raise self._damage("a sparse member; pack it again without --sparse")
            if b"size" in fields:
                size = self._pax_size(fields[b"size"])
            name = long_name or (_text(fields[b"path"]) if b"path" in fields else _name(header))
            long_name, fields = None, {}
            if len(name) > _MAX_NAME:
                raise self._damage(f"a member whose name has {len(name)} characters")
            if kind in _WITHOUT_DATA or (kind == b"\0" and name.endswith("/")):
                continue
            offset = self._at
            if offset + size > self._end:
                damage = self._damage(
                    f"member {name[:200]!r} of {size} bytes is cut off: the file has "
                    f"{self._end} bytes"
                )
                raise CutOff(str(damage), name)
            self._at += -(-size // _BLOCK) * _BLOCK
            if kind in _FILES:
                yield Member(name, offset, size)

    def _header(self) -> bytes | None:
        """The next header, its checksum checked; null at the end mark. Moves past it."""
        block = self._read(_BLOCK)
        self._header_at = self._at
        if self._at == 0:
            self._check_start(block)
        if len(block) < _BLOCK:
            raise self._damage("the file ends without the end mark of a tar; it was cut off")
        if not any(block):
            self._check_tail()
            return None
        stored = self._number(block[148:156], "checksum")
        blanked = block[:148] + b" " * 8 + block[156:]
        unsigned = sum(blanked)
        # Some old programs summed signed bytes.
        if stored != unsigned and stored != unsigned - 256 * sum(b > 127 for b in blanked):
            raise self._damage("a header with a wrong checksum")
        self._at += _BLOCK
        return block

    def _check_start(self, block: bytes) -> None:
        if not block:
            raise DataError(f"{self._path}: is empty; expected a tar")
        for magic, name in _COMPRESSED.items():
            if block.startswith(magic):
                raise DataError(
                    f"{self._path}: is compressed with {name}; unpack it to a plain tar, whose "
                    "members can be read by offset"
                )

    def _check_tail(self) -> None:
        """Raises DataError if anything but zeros follows the end mark: it would go unseen."""
        start = self._at
        while piece := self._read(2**16):
            if piece.count(0) != len(piece):
                self._header_at = self._at + len(piece) - len(piece.lstrip(b"\0"))
                raise self._damage(
                    f"more follows the end mark at byte {start}: tars put after each other; "
                    "give them as files of their own"
                )
            self._at += len(piece)

    def _extended(self, size: int) -> bytes:
        if size > _MAX_EXTENDED:
            raise self._damage(f"an extended header of {size} bytes, at most {_MAX_EXTENDED} read")
        content = self._read(size)
        if len(content) < size:
            raise self._damage("an extended header is cut off")
        self._at += -(-size // _BLOCK) * _BLOCK
        return content

    def _pax(self, content: bytes) -> dict[bytes, bytes]:
        """The `length key=value` lines of a pax header."""
        fields: dict[bytes, bytes] = {}
        done = 0
        while done < len(content) and content[done]:
            digits, space, _ = content[done : done + 20].partition(b" ")
            length = int(digits) if space and digits.isdigit() else 0
            line = content[done + len(digits) + 1 : done + length]
            key, equals, value = line.partition(b"=")
            if not (equals and line.endswith(b"\n")) or done + length > len(content):
                raise self._damage("a pax header that cannot be understood")
            fields[key] = value[:-1]
            done += length
        return fields

    def _pax_size(self, digits: bytes) -> int:
        if not digits.isdigit() or len(digits) > 20:
            raise self._damage(f"a pax header with the size {digits[:40]!r}")
        return int(digits)

    def _number(self, field: bytes, what: str) -> int:
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        digits = field.split(b"\0", 1)[0].strip()
        if digits.strip(b"01234567"):
            raise self._damage(f"a header whose {what} is {field!r}")
        return int(digits or b"0", 8)

    def _read(self, size: int) -> bytes:
        return os.pread(self._descriptor, size, self._at)

    def _damage(self, what: str) -> DataError:
        return DataError(f"{self._path}: damaged at byte {self._header_at}: {what}")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's own headers keep times where ustar keeps the beginning of a long name.
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
