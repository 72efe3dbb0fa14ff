"""A document: text that is learned, with pictures and videos where they stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.data.draft import Draft, Medium, Part, Picture, Special, Text, Video
from megatron_vlm.data.sources.media import MediumKind
from megatron_vlm.errors import DataError

PARAGRAPH_BREAK = "\n\n"
"""Between two texts that follow each other without a picture. Our choice."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture or a video in a document."""

    kind: MediumKind
    medium: Medium


def document_draft(
    pieces: Sequence[str | Shown], entry: bytes = b"{}", fps: float | None = None
) -> Draft:
    """The sample of a document: its text is learned, and so is the `<|eos|>` that ends it.

    Args:
        pieces: texts and media in order; empty texts are passed over, and two texts in a row are
            two paragraphs.
        entry: kept beside the sample.
        fps: frames a second of its videos; null: the build's default.

    Raises:
        DataError: no text, so nothing is learned.
    """
    parts: list[Part] = []
    media: list[Medium] = []
    for piece in pieces:
        if isinstance(piece, Shown):
            place = len(media)
            parts.append(Video(place, fps) if piece.kind == "video" else Picture(place))
            media.append(piece.medium)
        elif piece:
            if parts and isinstance(parts[-1], Text):
                parts[-1] = Text(parts[-1].text + PARAGRAPH_BREAK + piece, True)
            else:
                parts.append(Text(piece, True))
    if not any(isinstance(part, Text) and part.text.strip() for part in parts):
        raise DataError("holds no text, so there is nothing to learn")
    parts.append(Special("eos", True))
    return Draft(tuple(parts), tuple(media), entry)
