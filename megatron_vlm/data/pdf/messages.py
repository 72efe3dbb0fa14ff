"""What the reading process and its child say to each other: a JSON header and byte strings.

A message is eight bytes of its header's length, the header, and the byte strings whose lengths
the header holds. Nothing in it is code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

_LENGTH = struct.Struct(">Q")
_MAX_HEADER = 64 * 2**20


class Message(NamedTuple):
    """A header and what goes with it."""

    header: dict[str, Any]
    blobs: list[bytes]


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> list[bytes]:
    """The pieces to write, in order."""
    text = json.dumps({**header, "blobs": [len(blob) for blob in blobs]}).encode()
    return [_LENGTH.pack(len(text)) + text, *blobs]


def unpack(read: Callable[[int], bytes], max_bytes: int) -> Message:
    """Read one message.

    Args:
        read: gives exactly so many bytes.
        max_bytes: most bytes of all blobs.

    Raises:
        ValueError: this is no message, or it is too large.
    """
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    if length > _MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(read(length))
    sizes = header.pop("blobs")
    if sum(sizes) > max_bytes:
        raise ValueError(f"{sum(sizes)} bytes; at most {max_bytes}")
    return Message(header, [read(size) for size in sizes])
