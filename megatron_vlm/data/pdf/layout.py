"""Reading order: from words and pictures scattered over a page to regions of one column each.

A recursive cut. The page falls into bands, separated by white across its whole width; bands in a
row that share a white gutter are columns, read one after the other and cut again by themselves;
whatever has no gutter is read from top to bottom. A headline over two columns is a band without
a gutter, so it comes first. The rows of a table share gutters too: they are told from columns by
standing on common lines and being short, and are read row by row.

Not done: vertical writing, and columns that are read from right to left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from megatron_vlm.data.pdf.chars import Word
from megatron_vlm.data.pdf.frames import Box

GUTTER = 0.8
"""Narrowest white between two columns, in font sizes; LaTeX's own is 1."""
_PROSE = 20
"""Mean characters of a line above which what stands side by side is prose and no table."""
_ALIGNED = 0.7
"""Share of common lines from which on what stands side by side may be a table."""

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Item:
    """A word or a picture, as far as its place counts."""

    left: float
    right: float
    top: float
    """Of the core, which leaves white between any two lines: letters without what sticks out."""
    bottom: float
    """Of the core; a word's baseline."""
    size: float
    """Font size; 0 for a picture."""
    word: Word | None = None
    picture: int | None = None
    """Its number."""


@dataclass(slots=True)
class Band:
    """Items between two strips of white that cross their whole region."""

    items: list[Item] = field(default_factory=list)
    bottom: float = 0.0


def word_item(word: Word) -> Item:
    """A word as the layout sees it."""
    top = word.baseline - 0.5 * word.size
    return Item(word.box.x0, word.box.x1, top, word.baseline, word.size, word=word)


def picture_item(number: int, box: Box) -> Item:
    """A picture as the layout sees it."""
    return Item(box.x0, box.x1, box.y0, box.y1, 0.0, picture=number)


def regions(items: Sequence[Item]) -> list[list[Item]]:
    """Cut into regions that are read from top to bottom, in reading order."""
    found: list[list[Item]] = []
    plain: list[Item] = []
    bands = _bands(items)
    gutter = GUTTER * _usual_size(items)
    number = 0
    while number < len(bands):
        group = _columns(bands[number:], gutter)
        if group is None:
            plain += bands[number].items
            number += 1
            continue
        skipped, taken, columns = group
        for band in bands[number : number + skipped]:
            plain += band.items
        if plain:
            found.append(plain)
            plain = []
        for column in columns:
            found += regions(column)
        number += taken
    if plain:
        found.append(plain)
    return found


def _usual_size(items: Sequence[Item]) -> float:
    return median([item.size for item in items if item.word is not None] or [10.0])


def _bands(items: Sequence[Item]) -> list[Band]:
    bands: list[Band] = []
    for item in sorted(items, key=lambda item: item.top):
        if not bands or item.top >= bands[-1].bottom:
            bands.append(Band(bottom=item.bottom))
        bands[-1].items.append(item)
        bands[-1].bottom = max(bands[-1].bottom, item.bottom)
    return bands


def _columns(bands: Sequence[Band], gutter: float) -> tuple[int, int, list[list[Item]]] | None:
    """The columns that the first bands make.

    Returns:
        How many of the bands come before the columns, how many are taken with those, and the
        items of each column; None if the first bands are no columns.
    """
    left = min(item.left for band in bands for item in band.items)
    right = max(item.right for band in bands for item in band.items)
    free: list[Span] = [(left, right)]
    seen_left, seen_right = right, left
    gutters: list[Span] = []
    taken = 0
    for number, band in enumerate(bands, start=1):
        free = _common(free, _white(band, left, right), gutter)
        if not free:
            break
        seen_left = min(seen_left, *(item.left for item in band.items))
        seen_right = max(seen_right, *(item.right for item in band.items))
        inner = [(lo, hi) for lo, hi in free if seen_left < lo and hi < seen_right]
        if inner:
            gutters, taken = inner, number
    if not gutters:
        return None
    middles = [(lo + hi) / 2 for lo, hi in gutters]
    skipped = _leading(bands[:taken], middles)
    columns: list[list[Item]] = [[] for _ in range(len(middles) + 1)]
    for band in bands[skipped:taken]:
        for item in band.items:
            columns[_column(item, middles)].append(item)
    columns = [column for column in columns if column]
    if len(columns) < 2 or not _are_columns(columns):
        return None
    return skipped, taken, columns


def _white(band: Band, left: float, right: float) -> list[Span]:
    """Where a band has no item, between the edges of its region."""
    white: list[Span] = []
    reached = left
    for item in sorted(band.items, key=lambda item: item.left):
        if item.left > reached:
            white.append((reached, item.left))
        reached = max(reached, item.right)
    if right > reached:
        white.append((reached, right))
    return white


def _common(one: Sequence[Span], other: Sequence[Span], least: float) -> list[Span]:
    spans = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return [(lo, hi) for lo, hi in spans if hi - lo >= least]


def _column(item: Item, middles: Sequence[float]) -> int:
    return sum(item.left > middle for middle in middles)


def _leading(bands: Sequence[Band], middles: Sequence[float]) -> int:
    """Bands at the start that stand above the columns, such as the last line of an abstract."""
    first = {_column(item, middles) for item in bands[0].items}
    if len(first) > 1:
        return 0
    for number, band in enumerate(bands):
        if {_column(item, middles) for item in band.items} != first:
            # Columns that do not stand on common lines start with a band of one side only.
            limit = min(item.top for item in band.items) - 0.45 * _usual_size(band.items)
            while number and bands[number - 1].bottom > limit:
                number -= 1
            return number
    return 0


def _are_columns(columns: Sequence[Sequence[Item]]) -> bool:
    """Whether these are columns, and not the cells of a table or words far apart."""
    lines = [_baselines(column) for column in columns]
    pictures = [any(item.picture is not None for item in column) for column in columns]
    if any(len(found) < 2 and not picture for found, picture in zip(lines, pictures, strict=True)):
        return False
    for number in range(len(columns) - 1):
        pair = (number, number + 1)
        if pictures[pair[0]] or pictures[pair[1]]:
            continue
        prose = min(_line_length(columns[i], len(lines[i])) for i in pair) >= _PROSE
        if not prose and _aligned(lines[pair[0]], lines[pair[1]]) >= _ALIGNED:
            return False
    return True


def _baselines(column: Sequence[Item]) -> list[tuple[float, float]]:
    """Baseline and font size of each line of words, from the top."""
    lines: list[tuple[float, float]] = []
    for item in sorted(column, key=lambda item: item.bottom):
        if item.word is None:
            continue
        if not lines or item.bottom - lines[-1][0] > 0.5 * max(item.size, lines[-1][1]):
            lines.append((item.bottom, item.size))
    return lines


def _line_length(column: Sequence[Item], lines: int) -> float:
    return sum(len(item.word.text) + 1 for item in column if item.word is not None) / max(lines, 1)


def _aligned(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Share of the shorter list that has a line of the other at the same height."""
    few, many = sorted((one, other), key=len)
    common = sum(
        any(abs(baseline - there) < 0.25 * size for there, _ in many) for baseline, size in few
    )
    return common / max(len(few), 1)
