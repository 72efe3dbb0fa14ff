"""What can be set about reading PDF files, and the bounds that hold whatever is set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_vlm.errors import DataError

PdfMode = Literal["masked", "interleaved"]
"""What becomes of a PDF: pages with covered text, or documents of text and pictures."""

_MODES: dict[str, PdfMode] = {"masked": "masked", "interleaved": "interleaved"}

MAX_PDF_BYTES = 512 * 2**20
"""Largest file that is read."""
MAX_PICTURE_PIXELS = 80_000_000
"""Largest embedded picture that is decoded; what the data set's own decoders take."""


@dataclass(frozen=True, slots=True)
class PdfSettings:
    """How PDF files are read. dots.vlm1 publishes the two uses and no numbers: all are ours."""

    max_pages: int = 1000
    """Pages of a document that are read, from its first; those after them are left out."""
    max_bytes: int = 512 * 2**20
    """Bytes of the pictures made of one document. Pages after that are left out."""
    dpi: float = 144.0
    """Pixels an inch at which pages are rendered; a page of A4 is 1191 x 1684 then."""
    longest_side: int | None = None
    """Pixels of a rendered page's longer side, in place of `dpi`."""
    max_page_pixels: int = 8_000_000
    """Most pixels of a rendered page; a larger one is rendered at a lower resolution."""
    max_unmapped: float = 0.05
    """Share of a page's characters that may have no Unicode meaning (fonts without a usable
    Unicode map). Above it the page is left out, since its text is garbage."""

    seed: int = 0
    """Masked: draws, with the document's key and the page's number, what is covered."""
    covered_share: float = 0.3
    """Masked: share of a page's text blocks that are covered; at least one, never all."""
    min_page_chars: int = 150
    """Masked: characters of text, spaces not counted, below which a page is left out."""
    min_block_chars: int = 16
    """Masked: likewise of a block, below which it is never covered."""
    min_text_pixels: float = 8.0
    """Masked: font size in rendered pixels below which a block is never covered: it could not be
    read if it were seen."""
    cover_gray: int = 128
    """Masked: colour of the covers, 0 (black) to 255 (white)."""
    instruction: str = (
        "Parts of this page are covered. Write the text under each cover, in reading order."
    )
    """Masked: the question put to the model, after the picture."""

    pages_per_draft: int = 32
    """Interleaved: a longer document becomes several samples of so many pages each."""
    min_picture_side: int = 64
    """Interleaved: embedded pictures with a side of fewer pixels are left out as decoration."""
    min_picture_points: float = 36.0
    """Interleaved: embedded pictures shown with a side below so many points (1/72 inch) are left
    out as well: icons of high resolution."""

    seconds: float = 30.0
    """Time limit for opening a document, and for each of its pages."""
    memory_bytes: int = 3 * 2**30
    """Address space of the process that reads a document."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            DataError: one is out of its range; names it.
        """
        at_least = {
            "max_pages": 1,
            "max_bytes": 1,
            "max_page_pixels": 1024,
            "min_page_chars": 1,
            "min_block_chars": 1,
            "pages_per_draft": 1,
            "min_picture_side": 1,
            "memory_bytes": 2**30,
        }
        for name, least in at_least.items():
            _check(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        for name in ("dpi", "min_text_pixels", "min_picture_points", "seconds"):
            value = getattr(self, name)
            _check(name, value, math.isfinite(value) and value > 0, "a number above 0")
        for name in ("covered_share", "max_unmapped"):
            value = getattr(self, name)
            _check(name, value, 0 <= value <= 1, "a share from 0 to 1")
        longest = self.longest_side
        _check("longest_side", longest, longest is None or longest >= 28, "null or at least 28")
        _check(
            "max_page_pixels",
            self.max_page_pixels,
            self.max_page_pixels <= MAX_PICTURE_PIXELS,
            f"at most {MAX_PICTURE_PIXELS}",
        )
        _check("cover_gray", self.cover_gray, 0 <= self.cover_gray <= 255, "0 to 255")


def check_mode(mode: str) -> PdfMode:
    """The mode itself.

    Raises:
        DataError: there is no such mode.
    """
    if mode not in _MODES:
        raise DataError(f"PDF mode {mode!r}: expected one of {', '.join(_MODES)}")
    return _MODES[mode]


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise DataError(f"PDF setting {name}: {value!r}; expected {expected}")
