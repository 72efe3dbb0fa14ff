"""Documents of text and pictures, in the order in which a reader comes upon them.

After dots.vlm1, which turns PDF files into interleaved documents. Here the text is what the file
itself says; nothing is recognised.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_vlm.data.draft import Draft, Medium, Part, Picture, Special, Text
from megatron_vlm.data.pdf.left_out import left_out, nothing_left
from megatron_vlm.data.pdf.messages import Message
from megatron_vlm.data.pdf.pool import read_pages
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.data.pdf.wording import join
from megatron_vlm.errors import DataError

_MARGIN = 0.12
"""Share of a page's height in which a running head or foot stands."""
_RUNNING_PAGES = 3
_RUNNING_SHARE = 0.3
"""A head or foot runs if it is on so many pages, and on this share of them."""
_BREAK = "\n\n"


def interleaved_documents(
    encoded: bytes, name: str, settings: PdfSettings | None = None
) -> list[Draft]:
    """The text and the pictures of a PDF in reading order, all text learned.

    A document of more than `pages_per_draft` pages becomes several drafts, each of which ends
    with the end token. Lines are joined to paragraphs, also across columns and pages; running
    heads, feet and page numbers are left out; a picture that comes again is given once. A page
    without any text (a scan, a drawing) is a picture of the whole page; an empty page is nothing.

    Args:
        encoded: the PDF file.
        name: what errors and media call it.
        settings: sizes and limits; null for the defaults.

    Returns:
        Drafts in the order of the pages. `entry` holds the file, the first and the last page
        (from 1), the number of pages, and how many were left out for which reason.

    Raises:
        DataError: the document cannot be read, or has no text that could be learned; names it.
        TaskFailed: no process can be started to read it.
    """
    settings = settings or PdfSettings()
    pages, answers = read_pages(encoded, name, "interleaved", settings)
    reasons = left_out(pages, answers, settings)
    running = _running(answers)
    seen: set[bytes] = set()
    found = []
    for start in range(0, len(answers), settings.pages_per_draft):
        part = answers[start : start + settings.pages_per_draft]
        # What these pages show counts as given only if they become a draft.
        met = set(seen)
        draft = _draft(part, start, name, running, met)
        if draft is not None:
            seen = met
            found.append((start, len(part), *draft))
        elif shown := sum(_shows(answer) for answer in part):
            # Another number of pages a draft might have kept them.
            alone = (
                f"pictures without text to learn on any of {settings.pages_per_draft} pages "
                "(pages_per_draft)"
            )
            reasons[alone] = reasons.get(alone, 0) + shown
    drafts = []
    for start, count, parts, media in found:
        entry = {
            "file": name,
            "first_page": start + 1,
            "last_page": start + count,
            "pages": pages,
            "left_out": reasons,
        }
        drafts.append(Draft(parts, media, json.dumps(entry).encode()))
    if not drafts:
        if any("items" in answer.header and answer.header["items"] for answer in answers):
            raise DataError(f"{name}: pictures without text to learn (a scan); recognise it first")
        raise nothing_left(name, pages, reasons)
    return drafts


def _draft(
    answers: Sequence[Message], start: int, name: str, running: set[str], seen: set[bytes]
) -> tuple[list[Part], list[Medium]] | None:
    """Parts and media of some pages; None if they hold no text.

    Args:
        answers: of the pages.
        start: pages of the document before these.
        name: of the document.
        running: heads and feet that are left out.
        seen: digests of the pictures that were given, which grows.
    """
    content: list[str | int] = []
    media: list[Medium] = []
    # What the last text ended with, while nothing has come after it.
    size: float | None = None
    for number, (page, blobs) in enumerate(answers, start=start + 1):
        for item in page.get("items", []):
            if "picture" in item:
                blob = blobs[item["picture"]]
                digest = hashlib.sha256(blob).digest()
                if digest not in seen:
                    seen.add(digest)
                    content.append(len(media))
                    title = f"{name} page {number} picture {item['picture'] + 1}"
                    media.append(Medium(title, len(blob), partial(bytes, blob)))
                continue
            if _edge(item) and _shape(item["text"]) in running:
                continue
            last = content[-1] if content else None
            if isinstance(last, str) and size == item["size"] and _goes_on(last, item["text"]):
                content[-1] = join(last, item["text"], soft=True)
            else:
                content.append(item["text"])
            size = item["size"]
    if not any(isinstance(piece, str) for piece in content):
        return None
    return _parts(content), media


def _shows(answer: Message) -> bool:
    """Whether a page has a picture."""
    return any("picture" in item for item in answer.header.get("items", []))


def _parts(content: Sequence[str | int]) -> list[Part]:
    """Texts and pictures, an empty line around each text, and the end."""
    parts: list[Part] = []
    for number, piece in enumerate(content):
        if isinstance(piece, int):
            parts.append(Picture(piece))
            continue
        before = _BREAK if number and isinstance(content[number - 1], int) else ""
        after = _BREAK if number + 1 < len(content) else ""
        if parts and isinstance(parts[-1], Text):
            parts[-1] = Text(parts[-1].text + piece + after, True)
        else:
            parts.append(Text(before + piece + after, True))
    return [*parts, Special("eos", True)]


def _running(answers: Sequence[Message]) -> set[str]:
    """Shapes of what stands at the edge of page after page."""
    pages = [answer.header["items"] for answer in answers if answer.header.get("items")]
    counts: Counter[str] = Counter()
    for items in pages:
        counts.update({_shape(item["text"]) for item in items if "text" in item and _edge(item)})
    least = max(_RUNNING_PAGES, _RUNNING_SHARE * len(pages))
    return {shape for shape, count in counts.items() if count >= least}


def _edge(item: dict[str, Any]) -> bool:
    top, bottom = item["place"]
    return bool(bottom < _MARGIN or top > 1 - _MARGIN)


def _shape(text: str) -> str:
    """A head or foot without the page's number."""
    return re.sub(r"\d+|\b[ivxlc]+\b", "#", text.casefold())


def _goes_on(before: str, after: str) -> bool:
    """Whether a paragraph goes on in the next column or on the next page."""
    return (before[-1].isalpha() or before[-1] in ",-\u2010\u00ad") and after[0].islower()
