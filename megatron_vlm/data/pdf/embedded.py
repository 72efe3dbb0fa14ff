"""Pictures that a page embeds, taken out upright."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.pdf.frames import Box, Frame, Matrix, apply, compose
from megatron_vlm.data.pdf.objects import object_matrix, page_objects
from megatron_vlm.data.pdf.render import encode_png
from megatron_vlm.data.pdf.settings import MAX_PICTURE_PIXELS, PdfSettings

_BACKGROUND = 0.85
"""Share of a page from which on a picture is its background or its scan."""
_SAME = 4.0
"""Mean levels (of 255) by which two decoders of JPEG may differ."""
_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture and where it stands on the page."""

    box: Box
    encoded: bytes
    """A JPEG or a PNG."""


def embedded_pictures(
    document: Any, page: Any, frame: Frame, settings: PdfSettings
) -> Iterator[Embedded]:
    """The pictures of a page with text: large enough, not its background, not of one colour.

    JPEG files that need no turning come as they are; other lossy ones are compressed again at
    quality 95, and everything else is a PNG of the same pixels. Transparency is laid over white;
    clipping is ignored: a picture comes whole. Those of more than `MAX_PICTURE_PIXELS` are left
    out.

    Args:
        document: the document.
        page: a loaded page. Its pictures are changed in memory: render it before.
        frame: the page as it is seen.
        settings: the smallest sizes.
    """
    import pypdfium2.raw as pdfium

    whole = Box(0, 0, frame.width, frame.height)
    for item, outer in page_objects(page, pdfium.FPDF_PAGEOBJ_IMAGE):
        matrix = compose(compose(object_matrix(item), outer), frame.matrix)
        box = _clip(_square(matrix), whole)
        width, height = ctypes.c_uint(), ctypes.c_uint()
        if box is None or not pdfium.FPDFImageObj_GetImagePixelSize(item, width, height):
            continue
        covers_page = box.width * box.height > _BACKGROUND * frame.width * frame.height
        if (
            min(width.value, height.value) < settings.min_picture_side
            or width.value * height.value > MAX_PICTURE_PIXELS
            or min(box.width, box.height) < settings.min_picture_points
            or covers_page
        ):
            continue
        stored = _decode(document, page, item, width.value, height.value)
        if stored is None or (stored == stored[0, 0]).all():
            continue
        upright = _turn(stored, matrix)
        encoded = _encode(item, stored, upright)
        if encoded is not None:
            yield Embedded(box, encoded)


def _square(matrix: Matrix) -> Box:
    corners = [apply(matrix, x, y) for x in (0, 1) for y in (0, 1)]
    xs, ys = [x for x, _ in corners], [y for _, y in corners]
    return Box(min(xs), min(ys), max(xs), max(ys))


def _clip(box: Box, whole: Box) -> Box | None:
    """The visible part; None for a picture whose middle is off the page (or no number)."""
    if not whole.holds_middle_of(box):
        return None
    return Box(
        max(box.x0, whole.x0), max(box.y0, whole.y0), min(box.x1, whole.x1), min(box.y1, whole.y1)
    )


def _decode(
    document: Any, page: Any, item: Any, width: int, height: int
) -> NDArray[np.uint8] | None:
    """The picture as it is stored, its mask applied, over white; None if it cannot be decoded.

    Returns:
        uint8 [height, width, 3].
    """
    import pypdfium2.raw as pdfium

    # One pixel to a point, so that the library neither scales nor turns it.
    pdfium.FPDFPageObj_SetMatrix(item, pdfium.FS_MATRIX(width, 0, 0, height, 0, 0))
    bitmap = pdfium.FPDFImageObj_GetRenderedBitmap(document, page, item)
    if not bitmap:
        return None
    try:
        return _over_white(bitmap)
    finally:
        pdfium.FPDFBitmap_Destroy(bitmap)


def _over_white(bitmap: Any) -> NDArray[np.uint8] | None:
    import pypdfium2.raw as pdfium

    width, height = pdfium.FPDFBitmap_GetWidth(bitmap), pdfium.FPDFBitmap_GetHeight(bitmap)
    stride = pdfium.FPDFBitmap_GetStride(bitmap)
    channels = {
        pdfium.FPDFBitmap_Gray: 1,
        pdfium.FPDFBitmap_BGR: 3,
        pdfium.FPDFBitmap_BGRx: 4,
        pdfium.FPDFBitmap_BGRA: 4,
    }.get(form := pdfium.FPDFBitmap_GetFormat(bitmap))
    buffer = pdfium.FPDFBitmap_GetBuffer(bitmap)
    if channels is None or not buffer or width < 1 or height < 1:
        return None
    memory = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_ubyte * (stride * height))).contents
    rows = np.frombuffer(memory, dtype=np.uint8).reshape(height, stride)[:, : width * channels]
    pixels = rows.reshape(height, width, channels)
    if channels == 1:
        return np.repeat(pixels, 3, axis=2)
    colour = np.ascontiguousarray(pixels[..., 2::-1])
    if form == pdfium.FPDFBitmap_BGRA and (pixels[..., 3] < 255).any():
        alpha = pixels[..., 3:].astype(np.uint16)
        mixed = (colour * alpha + 255 * (255 - alpha) + 127) // 255
        colour = mixed.astype(np.uint8)
    return colour


def _turn(image: NDArray[np.uint8], matrix: Matrix) -> NDArray[np.uint8]:
    """Turn and mirror a stored picture as its matrix shows it, by quarter turns only.

    Args:
        image: [height, width, 3].
        matrix: from the unit square to the frame, in which y grows downwards.
    """
    a, b, c, d, _, _ = matrix
    if abs(a) >= abs(b):
        across, down = a > 0, d < 0
    else:
        image = image.transpose(1, 0, 2)
        across, down = c < 0, b > 0
    return np.ascontiguousarray(image[:: 1 if down else -1, :: 1 if across else -1])


def _encode(item: Any, stored: NDArray[np.uint8], upright: NDArray[np.uint8]) -> bytes | None:
    from PIL import Image

    filters = _filters(item)
    if filters == ["DCTDecode"] and np.array_equal(stored, upright):
        raw = _raw(item)
        if _decodes_to(raw, stored):
            return raw
    if filters and filters[-1] in ("DCTDecode", "JPXDecode"):
        file = BytesIO()
        Image.fromarray(upright).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return file.getvalue()
    return encode_png(upright)


def _filters(item: Any) -> list[str]:
    import pypdfium2.raw as pdfium

    names = []
    for number in range(pdfium.FPDFImageObj_GetImageFilterCount(item)):
        length = pdfium.FPDFImageObj_GetImageFilter(item, number, None, 0)
        name = ctypes.create_string_buffer(length)
        pdfium.FPDFImageObj_GetImageFilter(item, number, name, length)
        names.append(name.value.decode("latin-1"))
    return names


def _raw(item: Any) -> bytes:
    import pypdfium2.raw as pdfium

    length = pdfium.FPDFImageObj_GetImageDataRaw(item, None, 0)
    data = ctypes.create_string_buffer(length)
    pdfium.FPDFImageObj_GetImageDataRaw(item, data, length)
    return data.raw[:length]


def _decodes_to(jpeg: bytes, stored: NDArray[np.uint8]) -> bool:
    """Whether a JPEG looks by itself as it does in the PDF.

    The PDF may invert or recolour it, mask it, or ignore its EXIF orientation.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(jpeg), formats=["JPEG"]) as image:
            if image.mode not in ("L", "RGB") or image.getexif().get(0x0112, 1) != 1:
                return False
            if (image.height, image.width) != stored.shape[:2]:
                return False
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    difference = np.abs(pixels.astype(np.int16) - stored)
    return float(difference.mean()) <= _SAME
