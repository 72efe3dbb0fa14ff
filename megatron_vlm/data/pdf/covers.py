"""Covers for some of a page's text, proven on the pixels.

A cover is one flat rectangle over a whole block. Where it lies follows from the font size and
the length of the lines, rounded up, and not from the shapes of the letters below. Two renders
prove it: without the covered text, nothing outside the covers may change; without all other text,
nothing inside them may. So what is covered is exactly the answer: no word of it is seen, and no
other word is hidden, not even in part. Text that paints nothing itself (the invisible layer over
a scan) cannot be switched off; there the ink must lie below the words, and none may cross a
cover's edge.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.pdf.blocks import Block
from megatron_vlm.data.pdf.chars import PageText, Word
from megatron_vlm.data.pdf.frames import Box
from megatron_vlm.data.pdf.left_out import FOUND, PageUnfit
from megatron_vlm.data.pdf.objects import address, object_bounds, page_objects
from megatron_vlm.data.pdf.render import render_page
from megatron_vlm.data.pdf.settings import PdfSettings
from megatron_vlm.errors import DataError

_ASCENT, _DESCENT, _SIDE = 0.85, 0.28, 0.15
"""What a cover adds above and below a baseline and beside a line, in font sizes."""
_STEP, _OFFSET = 0.25, 0.07
"""A cover's width is a multiple of the one and the other more, in font sizes. With the offset no
multiple of usual advances (0.5, 0.6 or 1) is where rounding up turns."""
_GROWTH = 0.5
"""How far a cover may grow over ink that sticks out, in font sizes."""
_INK = 48
"""Levels (of 255) by which ink differs from what is around it."""
_MAX_ROUNDS = 24

Pixels = tuple[int, int, int, int]
"""(x0, y0, x1, y1); the last two are not part of it."""


@dataclass(slots=True, eq=False)
class _Candidate:
    """A block that may be covered."""

    number: int
    """Of the block, in reading order."""
    block: Block
    objects: frozenset[int]
    """Text objects that paint it."""
    lines: list[Pixels]
    """Where its ink is looked for."""
    cover: Pixels
    limit: Pixels
    """How far the cover may grow."""


@dataclass(frozen=True, slots=True)
class CoveredPage:
    """A page with covers, and what is below them."""

    image: NDArray[np.uint8]
    """[height, width, 3]."""
    blocks: list[Block]
    """The covered ones, in reading order."""
    covers: list[Pixels]
    """One for each."""


class _Proof:
    """Renders of one page with some of its text switched off."""

    def __init__(self, page: Any, text: PageText, width: int, height: int) -> None:
        import pypdfium2.raw as pdfium

        self._page, self._frame = page, text.frame
        self.width, self.height = width, height
        self.scale = (width / text.frame.width, height / text.frame.height)
        self.full = self._render()
        self._handles: dict[int, Any] = {}
        self.bounds: dict[int, Pixels] = {}
        for item, outer in page_objects(page, pdfium.FPDF_PAGEOBJ_TEXT):
            key = address(item)
            self._handles[key] = item
            box = object_bounds(item, outer, text.frame)
            if box is not None:
                self.bounds[key] = self.pixels(box, 3)

    @property
    def objects(self) -> set[int]:
        """All text objects."""
        return set(self._handles)

    def pixels(self, box: Box, margin: int) -> Pixels:
        """The pixels that a box of the frame touches, and so many around, inside the page."""
        sx, sy = self.scale
        return (
            min(max(math.floor(box.x0 * sx) - margin, 0), self.width),
            min(max(math.floor(box.y0 * sy) - margin, 0), self.height),
            min(max(math.ceil(box.x1 * sx) + margin, 0), self.width),
            min(max(math.ceil(box.y1 * sy) + margin, 0), self.height),
        )

    def ink(self, objects: Iterable[int]) -> NDArray[np.bool_]:
        """Where the page changes without these objects, [height, width]."""
        import pypdfium2.raw as pdfium

        handles = [self._handles[key] for key in objects if key in self._handles]
        for handle in handles:
            pdfium.FPDFPageObj_SetIsActive(handle, False)
        try:
            changed = self._render() != self.full
        finally:
            for handle in handles:
                pdfium.FPDFPageObj_SetIsActive(handle, True)
        # Four times as fast as `any` over the last axis.
        found: NDArray[np.bool_] = changed[..., 0] | changed[..., 1] | changed[..., 2]
        return found

    def unread(self, read: frozenset[int], cover: Pixels) -> set[int]:
        """Text objects inside a cover whose characters the library does not give.

        It gives letters that are painted twice (for bold) once.
        """
        return {
            key
            for key, bounds in self.bounds.items()
            if key not in read and _union(bounds, cover) == cover
        }

    def _render(self) -> NDArray[np.uint8]:
        return render_page(self._page, self._frame, self.width, self.height)


def cover_blocks(
    page: Any,
    text: PageText,
    blocks: Sequence[Block],
    size: tuple[int, int],
    settings: PdfSettings,
    draw: tuple[str, int],
) -> CoveredPage:
    """Render a page and cover some of its blocks.

    Args:
        page: the loaded page.
        text: its words.
        blocks: its blocks in reading order.
        size: (width, height) in pixels to render it at.
        settings: share, colour and seed.
        draw: the document's key and the page's number, which draw with the seed.

    Raises:
        DataError: no block can be covered.
    """
    if len(blocks) < 2:
        raise DataError("a single block of text, which leaves nothing to read around it")
    proof = _Proof(page, text, *size)
    _check_sizes(proof, blocks, settings)
    waiting = _candidates(proof, text, blocks, settings)
    waiting.sort(key=lambda candidate: _lot(settings.seed, *draw, candidate.number))
    wanted = min(max(round(settings.covered_share * len(blocks)), 1), len(blocks) - 1)
    chosen: list[_Candidate] = []
    for _ in range(_MAX_ROUNDS):
        while waiting and len(chosen) < wanted:
            chosen.append(waiting.pop(0))
        if not chosen:
            break
        before = [candidate.cover for candidate in chosen]
        dropped = _examine(proof, text, chosen)
        if not dropped and [candidate.cover for candidate in chosen] == before:
            return _covered(proof.full, chosen, settings.cover_gray)
        chosen = [candidate for candidate in chosen if candidate not in dropped]
    raise DataError("no block of text that can be covered without touching other text")


def _check_sizes(proof: _Proof, blocks: Sequence[Block], settings: PdfSettings) -> None:
    """Raises PageUnfit if a setting alone keeps every block from being covered."""
    nothing = "no block of text that can be covered: the "
    long = [block for block in blocks if _characters(block) >= settings.min_block_chars]
    if not long:
        raise PageUnfit(
            f"{nothing}longest has {FOUND} characters; PDF setting min_block_chars is "
            f"{settings.min_block_chars}",
            max(map(_characters, blocks)),
        )
    largest = max(_text_pixels(block, proof) for block in long)
    if largest < settings.min_text_pixels:
        raise PageUnfit(
            f"{nothing}largest text has {FOUND} pixels; PDF setting min_text_pixels is "
            f"{settings.min_text_pixels:g} (a higher dpi makes more)",
            largest,
        )


def _characters(block: Block) -> int:
    return sum(len(word.text) for word in block.words)


def _text_pixels(block: Block, proof: _Proof) -> float:
    """Height of its smallest text."""
    return min(word.size for word in block.words) * proof.scale[1]


def _lot(seed: int, key: str, page: int, block: int) -> bytes:
    """Draws a block: the same on every machine, and the same whatever the text says."""
    return hashlib.blake2b(json.dumps([seed, key, page, block]).encode()).digest()


def _candidates(
    proof: _Proof, text: PageText, blocks: Sequence[Block], settings: PdfSettings
) -> list[_Candidate]:
    read = frozenset[int]().union(*(word.objects for word in text.words))
    found = []
    for number, block in enumerate(blocks):
        words = block.words
        box = _cover_box(block)
        inside = (
            box.x0 >= 0
            and box.y0 >= 0
            and box.x1 <= text.frame.width
            and box.y1 <= text.frame.height
        )
        objects = frozenset[int]().union(*(word.objects for word in words))
        if (
            not inside
            or any(word.unmapped for word in words)
            or _characters(block) < settings.min_block_chars
            or _text_pixels(block, proof) < settings.min_text_pixels
        ):
            continue
        growth = math.ceil(_GROWTH * block.size * max(proof.scale))
        lines = [proof.pixels(line.box, 0) for line in block.lines]
        cover = proof.pixels(box, 1)
        limit = proof.pixels(box, 1 + growth)
        objects |= proof.unread(read, cover)
        found.append(_Candidate(number, block, objects, lines, cover, limit))
    return found


def _cover_box(block: Block) -> Box:
    boxes = [
        Box(
            word.box.x0 - _SIDE * word.size,
            word.baseline - _ASCENT * word.size,
            word.box.x1 + _SIDE * word.size,
            word.baseline + _DESCENT * word.size,
        )
        for word in block.words
    ]
    box = functools.reduce(Box.joined, boxes)
    step = _STEP * block.size
    steps = math.ceil(box.width / step - _OFFSET)
    return Box(box.x0, box.y0, box.x0 + (steps + _OFFSET) * step, box.y1)


def _core(word: Word) -> Box:
    return Box(word.box.x0, word.baseline - 0.5 * word.size, word.box.x1, word.baseline)


def _examine(proof: _Proof, text: PageText, chosen: list[_Candidate]) -> list[_Candidate]:
    """Those that cannot be covered; covers that ink sticks out of grow."""
    taken = frozenset[int]().union(*(candidate.objects for candidate in chosen))
    ink = proof.ink(taken)
    outside = ink.copy()
    for candidate in chosen:
        _part(outside, candidate.cover)[:] = False
    others = proof.ink(proof.objects - taken)
    covered_words = {word.place for candidate in chosen for word in candidate.block.words}
    rest = [_core(word) for word in text.words if word.place not in covered_words] + text.strays
    rest_pixels = np.array([proof.pixels(box, 0) for box in rest]).reshape(-1, 4)
    dropped = []
    for candidate in chosen:
        fits = _grow_over(candidate, outside, proof.bounds)
        seen = [bool(_part(ink, line).any()) for line in candidate.lines]
        if not any(seen):
            fits = fits and _lies_on_ink(proof.full, candidate)
        elif not all(seen):
            fits = False
        if (
            not fits
            or _part(others, candidate.cover).any()
            or _meets_any(candidate.cover, rest_pixels)
        ):
            dropped.append(candidate)
    # Ink that belongs to none of them: what is switched off changes the page elsewhere too.
    return list(chosen) if outside.any() and not dropped else dropped


def _grow_over(
    candidate: _Candidate, outside: NDArray[np.bool_], bounds: dict[int, Pixels]
) -> bool:
    """Grow over ink that the cover leaves; take it out of `outside`. False: beyond the limit."""
    for key in candidate.objects:
        if key not in bounds:
            continue
        x, y = bounds[key][:2]
        part = _part(outside, bounds[key])
        if not part.any():
            continue
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        ink = (
            x + int(columns[0]),
            y + int(rows[0]),
            x + int(columns[-1]) + 1,
            y + int(rows[-1]) + 1,
        )
        part[:] = False
        candidate.cover = _union(candidate.cover, ink)
    return _union(candidate.cover, candidate.limit) == candidate.limit


def _lies_on_ink(full: NDArray[np.uint8], candidate: _Candidate) -> bool:
    """For text that paints nothing: whether there is ink below each line, and none is cut.

    The cover grows by a pixel where its edge cuts ink.
    """
    gray = full.mean(axis=2)
    lines = [_part(gray, line) for line in candidate.lines]
    if any(not line.size or np.ptp(line) < _INK for line in lines):
        return False
    x0, y0, x1, y1 = candidate.cover
    height, width = gray.shape
    edges = [
        (gray[y0:y1, x0], gray[y0:y1, max(x0 - 1, 0)]),
        (gray[y0, x0:x1], gray[max(y0 - 1, 0), x0:x1]),
        (gray[y0:y1, x1 - 1], gray[y0:y1, min(x1, width - 1)]),
        (gray[y1 - 1, x0:x1], gray[min(y1, height - 1), x0:x1]),
    ]
    paper = np.median(np.concatenate([outer for _, outer in edges]))
    cut = [
        bool(((np.abs(inner - paper) > _INK) & (np.abs(outer - paper) > _INK)).any())
        for inner, outer in edges
    ]
    candidate.cover = (
        max(x0 - cut[0], 0),
        max(y0 - cut[1], 0),
        min(x1 + cut[2], width),
        min(y1 + cut[3], height),
    )
    at_edge = any(cut) and candidate.cover == (x0, y0, x1, y1)
    return not at_edge and _union(candidate.cover, candidate.limit) == candidate.limit


def _covered(full: NDArray[np.uint8], chosen: list[_Candidate], gray: int) -> CoveredPage:
    image = full.copy()
    chosen = sorted(chosen, key=lambda candidate: candidate.number)
    for candidate in chosen:
        _part(image, candidate.cover)[:] = gray
    return CoveredPage(
        image,
        [candidate.block for candidate in chosen],
        [candidate.cover for candidate in chosen],
    )


def _part(image: NDArray[Any], box: Pixels) -> NDArray[Any]:
    x0, y0, x1, y1 = box
    return image[y0:y1, x0:x1]


def _meets_any(cover: Pixels, boxes: NDArray[np.int_]) -> bool:
    """Whether a cover shares a pixel with any of the boxes [boxes, 4]."""
    x0, y0, x1, y1 = boxes.T
    return bool(((x0 < cover[2]) & (cover[0] < x1) & (y0 < cover[3]) & (cover[1] < y1)).any())


def _union(one: Pixels, other: Pixels) -> Pixels:
    return (
        min(one[0], other[0]),
        min(one[1], other[1]),
        max(one[2], other[2]),
        max(one[3], other[3]),
    )
