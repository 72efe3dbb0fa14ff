"""Which pages of a document became nothing, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_vlm.data.pdf.messages import Message
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.errors import DataError


def left_out(pages: int, answers: Sequence[Message], settings: PdfSettings) -> dict[str, int]:
    """How many pages were left out, by reason.

    Args:
        pages: of the document.
        answers: one for each page that was read, from the first.
        settings: the limits that cut a document.
    """
    reasons = Counter(
        str(answer.header["left_out"]) for answer in answers if "left_out" in answer.header
    )
    within = min(pages, settings.max_pages)
    if within > len(answers):
        reasons[f"pictures before it reach max_bytes {settings.max_bytes}"] = within - len(answers)
    if pages > within:
        reasons[f"after the first {settings.max_pages} (max_pages)"] = pages - within
    return dict(reasons)


def nothing_left(name: str, pages: int, reasons: dict[str, int]) -> DataError:
    """What to say of a document of which no page is left."""
    told = "; ".join(f"{count}: {reason}" for reason, count in reasons.items()) or "all empty"
    return DataError(f"{name}: none of its {pages} pages can be used ({told})")
