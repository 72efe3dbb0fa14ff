"""From a loaded page to pixels, and from pixels to a PNG."""

from __future__ import annotations

import ctypes
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.pdf.frames import Frame
from megatron_vlm.data.pdf.settings import PdfSettings


def page_pixels(frame: Frame, settings: PdfSettings) -> tuple[int, int]:
    """(width, height) of a rendered page, at most about `max_page_pixels` together."""
    if settings.longest_side is None:
        scale = settings.dpi / 72
    else:
        scale = settings.longest_side / max(frame.width, frame.height)
    pixels = frame.width * frame.height * scale**2
    if pixels > settings.max_page_pixels:
        scale *= (settings.max_page_pixels / pixels) ** 0.5
    # A strip of one pixel must not be longer than the whole page may be large.
    width, height = (
        min(max(round(side * scale), 1), settings.max_page_pixels)
        for side in (frame.width, frame.height)
    )
    return width, height


def render_page(page: Any, frame: Frame, width: int, height: int) -> NDArray[np.uint8]:
    """Paint a page over white, without annotations and form fields.

    Returns:
        uint8 [height, width, 3].
    """
    import pypdfium2.raw as pdfium

    image = np.full((height, width, 3), 255, dtype=np.uint8)
    address = image.ctypes.data_as(ctypes.c_void_p)
    bitmap = pdfium.FPDFBitmap_CreateEx(width, height, pdfium.FPDFBitmap_BGR, address, 3 * width)
    if not bitmap:
        raise MemoryError(f"a bitmap of {width} x {height}")
    # The page's own rotation is applied anyway.
    turns = (frame.turns - pdfium.FPDFPage_GetRotation(page)) % 4
    flags = pdfium.FPDF_REVERSE_BYTE_ORDER
    try:
        pdfium.FPDF_RenderPageBitmap(bitmap, page, 0, 0, width, height, turns, flags)
    finally:
        pdfium.FPDFBitmap_Destroy(bitmap)
    return image


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """A PNG without loss, of one channel where the picture is gray.

    Args:
        image: uint8 [height, width, 3].
    """
    from PIL import Image

    gray = image[..., 0]
    if (image[..., 1] == gray).all() and (image[..., 2] == gray).all():
        image = gray
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
    return file.getvalue()
