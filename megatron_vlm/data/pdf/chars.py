"""The words of a page: what each says, where it stands, and which objects paint it."""

from __future__ import annotations

import ctypes
import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_vlm.data.pdf.frames import Box, Frame, apply, make_frame
from megatron_vlm.data.pdf.objects import address
from megatron_vlm.errors import DataError

MAX_CHARACTERS = 50_000
"""Most characters of a page; a page of a newspaper has less than half as many."""

_UPRIGHT = math.cos(math.radians(10))
# What the library puts where a hyphen ends a line.
_LINE_END_HYPHENS = (0x02, 0xFFFE)
# Bullets of the Symbol and Wingdings fonts, which writers leave where those fonts have them.
_SYMBOL_BULLETS = {0xF0B7: "\u2022", 0xF0A7: "\u25aa", 0xF0D8: "\u27a2", 0xF0FC: "\u2713"}


@dataclass(frozen=True, slots=True)
class Word:
    """Characters without a space between them, upright, on one line."""

    text: str
    box: Box
    """From the first origin to the end of the last advance, or of its ink where that reaches
    further, and from the font's descent to its ascent."""
    baseline: float
    size: float
    """Of the font, in points."""
    font: int
    """Tells one font from another on this page."""
    place: int
    """Place in the order in which the page holds its words."""
    spaced: bool
    """Whether the page has a space between this word and the one before it in that order."""
    objects: frozenset[int]
    """Addresses of the text objects that paint it."""
    unmapped: bool
    """Whether a character of it has no meaning."""


@dataclass(frozen=True, slots=True)
class PageText:
    """All text of a page."""

    frame: Frame
    words: list[Word]
    strays: list[Box]
    """Boxes of the characters that are not upright when most are."""
    characters: int
    """All characters but spaces."""
    unmapped: int
    """Those without a meaning."""


@dataclass(frozen=True, slots=True)
class _Style:
    """What the characters of one text object share."""

    object: int
    size: float
    font: int
    direction: tuple[float, float]
    """Along the line, in the page's own coordinates; unit length."""
    mirrored: bool


@dataclass(frozen=True, slots=True)
class _Char:
    text: str
    bounds: tuple[float, float, float, float]
    """Left, bottom, right, top in the page's own coordinates."""
    origin: tuple[float, float]
    style: _Style
    unmapped: bool
    spaced: bool
    """Whether a space or a line break comes before it."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A character in the frame."""

    char: _Char
    box: Box
    left: float
    baseline: float


def read_text(page: Any, text_page: Any) -> PageText:
    """The words of a loaded page.

    The frame is turned so that most of the text is upright, whatever the page's rotation says.

    Raises:
        DataError: more than `MAX_CHARACTERS`, or a page without a size.
    """
    chars = list(_chars(text_page))
    frame = _frame(page, chars)
    words: list[Word] = []
    strays: list[Box] = []
    run: list[_Placed] = []
    for char in chars:
        box = frame.box(*char.bounds)
        if not _is_upright(char.style, frame):
            strays.append(box)
            continue
        placed = _Placed(char, box, *apply(frame.matrix, *char.origin))
        if run and (char.spaced or _are_apart(run[-1], placed)):
            words.append(_word(run, len(words)))
            run = []
        run.append(placed)
    if run:
        words.append(_word(run, len(words)))
    unmapped = sum(char.unmapped for char in chars)
    return PageText(frame, _once(words), strays, len(chars), unmapped)


def _once(words: list[Word]) -> list[Word]:
    """Words that are painted twice, a little apart (for bold, or a shadow), as one."""
    kept: dict[tuple[str, int, int], list[int]] = {}
    result: list[Word] = []
    for word in words:
        cell = max(word.size, 0.1)
        column, row = int(word.box.x0 // cell), int(word.baseline // cell)
        near = (
            number
            for x in (column - 1, column, column + 1)
            for y in (row - 1, row, row + 1)
            for number in kept.get((word.text, x, y), ())
        )
        same = next((number for number in near if _is_same(result[number], word)), None)
        if same is None:
            kept.setdefault((word.text, column, row), []).append(len(result))
            result.append(word)
            continue
        first = result[same]
        box, objects = first.box.joined(word.box), first.objects | word.objects
        result[same] = replace(first, box=box, objects=objects)
    return result


def _is_same(one: Word, other: Word) -> bool:
    far = 0.15 * one.size
    return abs(one.box.x0 - other.box.x0) < far and abs(one.baseline - other.baseline) < far


def _chars(text_page: Any) -> Iterator[_Char]:
    import pypdfium2.raw as pdfium

    count = pdfium.FPDFText_CountChars(text_page)
    if count > MAX_CHARACTERS:
        raise DataError(f"{count} characters; at most {MAX_CHARACTERS} are read")
    styles: dict[int, _Style] = {}
    spaced = True
    number = -1
    rect, x, y = pdfium.FS_RECTF(), ctypes.c_double(), ctypes.c_double()
    while (number := number + 1) < count:
        first = number
        code = pdfium.FPDFText_GetUnicode(text_page, number)
        if 0xD800 <= code < 0xDC00 and number + 1 < count:
            low = pdfium.FPDFText_GetUnicode(text_page, number + 1)
            if 0xDC00 <= low < 0xE000:
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
                number += 1
        item = pdfium.FPDFText_GetTextObject(text_page, first)
        if not item or pdfium.FPDFText_IsGenerated(text_page, first) == 1 or _is_space(code):
            spaced = True
            continue
        if not (
            pdfium.FPDFText_GetLooseCharBox(text_page, first, rect)
            and pdfium.FPDFText_GetCharOrigin(text_page, first, x, y)
        ):
            continue
        bounds = (
            min(rect.left, rect.right),
            min(rect.bottom, rect.top),
            max(rect.left, rect.right),
            max(rect.bottom, rect.top),
        )
        if not all(math.isfinite(value) for value in (*bounds, x.value, y.value)):
            continue
        key = address(item)
        if key not in styles:
            styles[key] = _style(text_page, first, item, key)
        has_error = pdfium.FPDFText_HasUnicodeMapError(text_page, first) == 1
        text = None if has_error else _meaning(code)
        origin = (x.value, y.value)
        yield _Char(text or "", bounds, origin, styles[key], text is None, spaced)
        spaced = False


def _is_space(code: int) -> bool:
    return code < 0x110000 and chr(code).isspace()


def _meaning(code: int) -> str | None:
    """The text of a character; None where it has no meaning."""
    if code in _LINE_END_HYPHENS:
        return "-"
    if code in _SYMBOL_BULLETS:
        return _SYMBOL_BULLETS[code]
    if not 0 < code < 0x110000 or code == 0xFFFD:
        return None
    # Control, private use, surrogate, unassigned.
    return None if unicodedata.category(chr(code)) in ("Cc", "Co", "Cs", "Cn") else chr(code)


def _style(text_page: Any, number: int, item: Any, key: int) -> _Style:
    import pypdfium2.raw as pdfium

    matrix = pdfium.FS_MATRIX()
    if not pdfium.FPDFText_GetMatrix(text_page, number, matrix):
        matrix.a = matrix.d = 1.0
    a, b, c, d = matrix.a, matrix.b, matrix.c, matrix.d
    along = math.hypot(a, b)
    direction = (a / along, b / along) if math.isfinite(along) and along > 0 else (1.0, 0.0)
    size = abs(pdfium.FPDFText_GetFontSize(text_page, number)) * math.hypot(c, d)
    font = address(pdfium.FPDFTextObj_GetFont(item))
    return _Style(key, size if math.isfinite(size) else 0.0, font, direction, a * d - b * c < 0)


def _frame(page: Any, chars: list[_Char]) -> Frame:
    import pypdfium2.raw as pdfium

    rect = pdfium.FS_RECTF()
    if not pdfium.FPDF_GetPageBoundingBox(page, rect):
        raise DataError("page has no size")
    edges = (rect.left, rect.bottom, rect.right, rect.top)
    if not all(math.isfinite(edge) for edge in edges) or not (
        rect.right - rect.left > 0 and rect.top - rect.bottom > 0
    ):
        raise DataError("page has no size")
    turns = pdfium.FPDFPage_GetRotation(page)
    votes = Counter(
        round(math.atan2(char.style.direction[1], char.style.direction[0]) / (math.pi / 2)) % 4
        for char in chars
    )
    if votes and votes.most_common(1)[0][1] > votes[turns]:
        turns = votes.most_common(1)[0][0]
    return make_frame(*edges, turns)


def _is_upright(style: _Style, frame: Frame) -> bool:
    a, b, c, d, _, _ = frame.matrix
    x, y = style.direction
    return a * x + c * y > _UPRIGHT and not style.mirrored


def _are_apart(last: _Placed, placed: _Placed) -> bool:
    """Whether no word goes on from one to the other: a jump along the line or across it."""
    size = max(last.char.style.size, placed.char.style.size)
    before, after = last.box, placed.box
    gap = max(after.x0 - before.x1, before.x0 - after.x1)
    return gap > 0.5 * size or abs(placed.baseline - last.baseline) > 0.6 * size


def _word(run: list[_Placed], place: int) -> Word:
    boxes = [placed.box for placed in run]
    chars = [placed.char for placed in run]
    right = max(box.x1 for box in boxes)
    box = Box(
        min(right, *(placed.left for placed in run)),
        min(box.y0 for box in boxes),
        right,
        max(box.y1 for box in boxes),
    )
    style = chars[0].style
    size = style.size
    if not 0.3 * size < box.height < 3 * size:
        # The font's own numbers say something else than what is seen.
        size = box.height
    return Word(
        "".join(char.text for char in chars),
        box,
        run[0].baseline,
        size,
        style.font,
        place,
        chars[0].spaced,
        frozenset(char.style.object for char in chars),
        any(char.unmapped for char in chars),
    )
