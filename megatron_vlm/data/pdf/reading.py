"""A page's blocks and pictures in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from megatron_vlm.data.pdf.blocks import Block, blocks_of
from megatron_vlm.data.pdf.chars import Word
from megatron_vlm.data.pdf.frames import Box
from megatron_vlm.data.pdf.layout import picture_item, regions, word_item

Piece: TypeAlias = Block | int
"""A block of text, or the number of a picture."""


def reading_order(words: Sequence[Word], pictures: Sequence[Box]) -> list[Piece]:
    """Blocks of text and pictures as they are read.

    Words on a picture, such as its labels, come right after it.

    Args:
        words: all words of the page.
        pictures: where each picture stands.
    """
    labels: dict[int, list[Word]] = {}
    free: list[Word] = []
    for word in words:
        under = next((i for i, box in enumerate(pictures) if box.holds_middle_of(word.box)), None)
        if under is None:
            free.append(word)
        else:
            labels.setdefault(under, []).append(word)
    items = [word_item(word) for word in free]
    items += [picture_item(number, box) for number, box in enumerate(pictures)]
    pieces: list[Piece] = []
    for region in regions(items):
        found = blocks_of([item.word for item in region if item.word is not None])
        shown = [item for item in region if item.picture is not None]
        for item in sorted(shown, key=lambda item: item.top):
            place = sum(block.lines[0].baseline <= item.top for block in found)
            found_before, found = found[:place], found[place:]
            pieces += found_before
            if item.picture is not None:
                pieces.append(item.picture)
                pieces += reading_order(labels.get(item.picture, []), [])
        pieces += found
    return pieces
