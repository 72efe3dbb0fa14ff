"""Writes a plain tar of small members quickly, and tells where each of them lies.

The format is USTAR, which has no extended headers: a member's content follows its 512-byte header.
tarfile makes the header once; after that only what differs between members is written over it,
which is several times as quick. What is written is digested on its way: that takes
no second read.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import BinaryIO

MAX_MEMBER_BYTES = 8**11 - 1
"""Largest member: its size is written in eleven octal digits."""

_NAME = slice(0, 100)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)


def _template() -> bytes:
    """A header without name, size and checksum; these count as spaces and zeros in the sum."""
    header = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    header[_SIZE] = bytes(12)
    header[_CHECKSUM] = b" " * 8
    return bytes(header)


_HEADER = _template()
_SUM = sum(_HEADER)


class TarWriter:
    """Appends members to a file."""

    def __init__(self, file: BinaryIO) -> None:
        """Write at the start of `file`, which stays the caller's to close."""
        self._file = file
        self._digest = hashlib.sha256()
        self.offset = 0
        """Bytes written."""

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the bytes written."""
        return self._digest.hexdigest()

    def add(self, name: str, content: bytes) -> int:
        """Append a member.

        Args:
            name: at most 100 ASCII characters.
            content: at most `MAX_MEMBER_BYTES`.

        Returns:
            Offset of its content in bytes.

        Raises:
            ValueError: the name or the content is too long.
            OSError: the disk refuses.
        """
        encoded = name.encode("ascii")
        if len(encoded) > 100 or len(content) > MAX_MEMBER_BYTES:
            raise ValueError(f"member {name} of {len(content)} bytes: too long for a tar")
        size = b"%011o" % len(content)
        header = bytearray(_HEADER)
        header[_NAME] = encoded.ljust(100, b"\0")
        header[_SIZE] = size + b"\0"
        header[_CHECKSUM] = b"%06o\0 " % (_SUM + sum(encoded) + sum(size))
        padding = -len(content) % tarfile.BLOCKSIZE
        for piece in (header, content, bytes(padding)):
            self._write(piece)
        offset = self.offset + tarfile.BLOCKSIZE
        self.offset = offset + len(content) + padding
        return offset

    def finish(self) -> None:
        """Write the end of the tar.

        Raises:
            OSError: the disk refuses.
        """
        end = 2 * tarfile.BLOCKSIZE
        end += -(self.offset + end) % tarfile.RECORDSIZE
        self._write(bytes(end))
        self.offset += end

    def _write(self, piece: bytes | bytearray) -> None:
        self._file.write(piece)
        self._digest.update(piece)
