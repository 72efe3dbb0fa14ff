"""Which pages of a document became nothing, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from megatron_vlm.data.pdf.messages import Message
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.errors import DataError

FOUND = "{found}"
"""Stands in a reason for what the page has, which differs from page to page."""


class PageUnfit(DataError):
    """Why a page becomes nothing, where a setting says so."""

    def __init__(self, reason: str, found: float) -> None:
        """Say it.

        Args:
            reason: with `FOUND` once, the setting's name and its value.
            found: what the page has.
        """
        super().__init__(reason)
        self.found = found


def left_out(pages: int, answers: Sequence[Message], settings: PdfSettings) -> dict[str, int]:
    """How many pages were left out, by reason.

    Args:
        pages: of the document.
        answers: one for each page that was read, from the first.
        settings: the limits that cut a document.
    """
    said = [answer.header for answer in answers if "left_out" in answer.header]
    found: dict[str, list[float]] = defaultdict(list)
    for header in said:
        if "found" in header:
            found[header["left_out"]].append(header["found"])
    # One reason for all pages that a setting has left out, with the range of what they have.
    reasons = Counter(
        header["left_out"].replace(FOUND, _range(found[header["left_out"]])) for header in said
    )
    within = min(pages, settings.max_pages)
    if within > len(answers):
        reasons[f"pictures before it reach max_bytes {settings.max_bytes}"] = within - len(answers)
    if pages > within:
        reasons[f"after the first {settings.max_pages} (max_pages)"] = pages - within
    return dict(reasons)


def _range(found: Sequence[float]) -> str:
    if not found:
        return ""
    ends = (min(found), max(found))
    low, high = (str(end) if isinstance(end, int) else f"{end:.3g}" for end in ends)
    return low if low == high else f"{low} to {high}"


def nothing_left(name: str, pages: int, reasons: dict[str, int]) -> DataError:
    """What to say of a document of which no page is left."""
    told = "; ".join(f"{count}: {reason}" for reason, count in reasons.items()) or "all empty"
    return DataError(f"{name}: none of its {pages} pages can be used ({told})")
