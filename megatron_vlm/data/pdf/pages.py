"""What a document's pages hold, one answer a page; runs in the child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_vlm.data.pdf.blocks import Block
from megatron_vlm.data.pdf.chars import PageText, read_text
from megatron_vlm.data.pdf.covers import cover_blocks
from megatron_vlm.data.pdf.embedded import embedded_pictures
from megatron_vlm.data.pdf.left_out import FOUND, PageUnfit
from megatron_vlm.data.pdf.messages import Message
from megatron_vlm.data.pdf.reading import reading_order
from megatron_vlm.data.pdf.render import encode_png, page_pixels, render_page
from megatron_vlm.data.pdf.settings import PdfMode, PdfSettings
from megatron_vlm.data.pdf.wording import vocabulary
from megatron_vlm.errors import DataError

_Read = Callable[[Any, Any, PageText, PdfSettings, tuple[str, int]], Message]


def read_document(
    encoded: bytes, mode: PdfMode, key: str, settings: PdfSettings
) -> Iterator[Message]:
    """Answers about a document: its number of pages, each page in order, and the end.

    A page's answer is `{"left_out": REASON}` (with `found` if that holds `FOUND`), or for masked
    `{"answer", "covers", "size"}` and the picture, or for interleaved `{"items"}` and the pictures
    that these count.

    Raises:
        DataError: the document cannot be opened, or has no pages.
    """
    import pypdfium2 as pdfium

    try:
        document = pdfium.PdfDocument(encoded)
    except pdfium.PdfiumError as error:
        raise DataError(_not_opened(error)) from error
    with document:
        pages = len(document)
        if not pages:
            raise DataError("PDF has no pages")
        yield Message({"pages": pages}, [])
        sent = 0
        for number in range(min(pages, settings.max_pages)):
            answer = _read_page(document.raw, _READERS[mode], settings, (key, number))
            sent += sum(len(blob) for blob in answer.blobs)
            if sent > settings.max_bytes:
                break
            yield answer
    yield Message({"end": True}, [])


def _not_opened(error: Any) -> str:
    import pypdfium2.raw as pdfium

    reasons = {
        pdfium.FPDF_ERR_PASSWORD: "PDF needs a password; store it without one",
        pdfium.FPDF_ERR_SECURITY: "PDF is encrypted in a way that cannot be read",
    }
    return reasons.get(error.err_code, "not a PDF, or damaged")


def _read_page(document: Any, read: _Read, settings: PdfSettings, draw: tuple[str, int]) -> Message:
    import pypdfium2.raw as pdfium

    damaged = Message({"left_out": "damaged"}, [])
    page = pdfium.FPDF_LoadPage(document, draw[1])
    if not page:
        return damaged
    try:
        text_page = pdfium.FPDFText_LoadPage(page)
        if not text_page:
            return damaged
        try:
            text = read_text(page, text_page)
            if text.unmapped > settings.max_unmapped * text.characters:
                raise PageUnfit(
                    f"text without a meaning (fonts that lack a Unicode map): {FOUND} of its "
                    f"characters; PDF setting max_unmapped is {settings.max_unmapped:g}",
                    text.unmapped / text.characters,
                )
            return read(document, page, text, settings, draw)
        finally:
            pdfium.FPDFText_ClosePage(text_page)
    except PageUnfit as error:
        return Message({"left_out": str(error), "found": error.found}, [])
    except DataError as error:
        return Message({"left_out": str(error)}, [])
    finally:
        pdfium.FPDF_ClosePage(page)


def _masked(
    document: Any, page: Any, text: PageText, settings: PdfSettings, draw: tuple[str, int]
) -> Message:
    if not text.characters:
        raise DataError("no text (a scan)")
    if text.characters < settings.min_page_chars:
        raise PageUnfit(
            f"too little text: {FOUND} characters; PDF setting min_page_chars is "
            f"{settings.min_page_chars}",
            text.characters,
        )
    blocks = [piece for piece in reading_order(text.words, []) if isinstance(piece, Block)]
    size = page_pixels(text.frame, settings)
    covered = cover_blocks(page, text, blocks, size, settings, draw)
    seen = vocabulary(word.text for word in text.words)
    answer = "\n\n".join(block.text(seen) for block in covered.blocks)
    return Message(
        {"answer": answer, "covers": covered.covers, "size": size}, [encode_png(covered.image)]
    )


def _interleaved(
    document: Any, page: Any, text: PageText, settings: PdfSettings, draw: tuple[str, int]
) -> Message:
    if not text.words:
        image = render_page(page, text.frame, *page_pixels(text.frame, settings))
        if (image == image[0, 0]).all():
            return Message({"items": []}, [])
        return Message({"items": [{"picture": 0}]}, [encode_png(image)])
    pictures = list(embedded_pictures(document, page, text.frame, settings))
    seen = vocabulary(word.text for word in text.words)
    items: list[dict[str, Any]] = []
    for piece in reading_order(text.words, [picture.box for picture in pictures]):
        if isinstance(piece, int):
            items.append({"picture": piece})
            continue
        box, said = piece.box, piece.text(seen)
        if said:
            place = [box.y0 / text.frame.height, box.y1 / text.frame.height]
            items.append({"text": said, "size": round(piece.size, 1), "place": place})
    return Message({"items": items}, [picture.encoded for picture in pictures])


_READERS: dict[PdfMode, _Read] = {"masked": _masked, "interleaved": _interleaved}
