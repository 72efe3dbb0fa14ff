"""JPEG through libjpeg-turbo: Pillow's pixels in less time, and strict where Pillow is not.

Both decode with the same library and the same settings (the exact DCT, smooth chroma), so the
pixels are equal. What is not plain JPEG of 8-bit gray or colour is left to Pillow.
"""

from __future__ import annotations

from threading import local

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from megatron_vlm.errors import DataError

_COLORS = {"Gray": "RGB", "YCbCr": "RGB", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}
_KEPT_BYTES = 24 << 20
"""Most that a thread keeps for its next picture. Our choice: 8 million pixels. Fresh memory, which
the system must clear first, made a decode a third slower."""

_scratch = local()


def decode_jpeg(encoded: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """Decode to RGB as stored, the EXIF orientation not applied.

    Args:
        encoded: the file.
        height: in pixels, as another reader found in the header.
        width: likewise.

    Returns:
        uint8 [height, width, 3], in memory that this thread's next call may overwrite; null if it
        is no JPEG of gray or colour of that size, or if anything in it is wrong.
    """
    if _color_space(encoded, height, width) != "RGB":
        return None
    try:
        return simplejpeg.decode_jpeg(encoded, "RGB", buffer=_room(height * width * 3))
    except ValueError:
        return None


def check_jpeg(encoded: bytes, height: int, width: int) -> bool:
    """Decode strictly, where this is possible.

    Arguments are those of `decode_jpeg`.

    Returns:
        Whether it was decoded; false leaves the check to Pillow.

    Raises:
        DataError: data are missing or damaged, also where Pillow would make up for it.
    """
    color_space = _color_space(encoded, height, width)
    if color_space is None:
        return False
    room = _room(height * width * len(color_space))
    try:
        simplejpeg.decode_jpeg(encoded, color_space, buffer=room, strict=True)
    except ValueError as error:
        raise DataError(f"picture is damaged ({error}); restore it or leave it out") from error
    return True


def _color_space(encoded: bytes, height: int, width: int) -> str | None:
    """What to decode it to; null where the two readers of the header differ or one refuses it."""
    try:
        found = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:  # also good ones with rare sampling factors
        return None
    return _COLORS.get(found[2]) if found[:2] == (height, width) else None


def _room(size: int) -> NDArray[np.uint8]:
    """At least `size` bytes, kept for this thread unless there are too many of them."""
    if size > _KEPT_BYTES:
        return np.empty(size, dtype=np.uint8)
    kept: NDArray[np.uint8] | None = getattr(_scratch, "bytes", None)
    if kept is None or kept.size < size:
        kept = _scratch.bytes = np.empty(size, dtype=np.uint8)
    return kept
