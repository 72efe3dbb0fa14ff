"""From lines to blocks: paragraphs, headings, entries of lists.

Inside a block a line's end is soft where the text merely ran out of room: the first word of the
next line would not have fitted. Elsewhere it is a line break.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

from megatron_vlm.data.pdf.chars import Word
from megatron_vlm.data.pdf.frames import Box
from megatron_vlm.data.pdf.lines import Line, lines_of
from megatron_vlm.data.pdf.wording import is_wide, join, normalise, parts_a_word

_BULLET = re.compile(r"[\u2022\u25aa\u25cf\u25e6\u2013\u2014\u2043\u27a2\u2713*+-]$")
_LARGER = 1.15
"""From this ratio of font sizes on a line is of another block."""
_WIDER = 1.25
"""From this ratio of line steps on, likewise."""
_WRAPPED = 0.25
"""Share of the lines with another below them that must be soft: where few are, as in a poem, those
are the longest and happen to look so."""
_LONG = 0.75
"""Share of the column's width from which on a line whose sentence goes on is soft in any case."""
_CELL_GAP = 1.5
"""White inside a line from which on it is the row of a table, in font sizes."""
_INDENT = (0.8, 5.0)
"""Of a paragraph's first line, in font sizes."""


@dataclass(slots=True)
class Block:
    """Lines that belong together; `soft[i]` tells the end of line i from a line break."""

    lines: list[Line]
    soft: list[bool]

    @property
    def words(self) -> list[Word]:
        """All of its words in reading order."""
        return [word for line in self.lines for word in line.words]

    @property
    def box(self) -> Box:
        """Around all of its lines."""
        return functools.reduce(Box.joined, (line.box for line in self.lines))

    @property
    def size(self) -> float:
        """Its usual font size, in points."""
        return median(line.size for line in self.lines)

    def text(self, vocabulary: Counter[str]) -> str:
        """What it says.

        Args:
            vocabulary: of the page, see `wording.join`.
        """
        text = self.lines[0].text()
        for line, soft in zip(self.lines[1:], self.soft, strict=True):
            text = join(text, line.text(), soft, vocabulary)
        return normalise(text)


def blocks_of(words: Sequence[Word]) -> list[Block]:
    """The blocks of one region, from top to bottom."""
    groups = _groups(lines_of(words))
    # A heading or a foot may be wider than the column: only lines that go on show its edges.
    going_on = [line for group in groups for line in group[:-1]]
    shown = going_on or [line for group in groups for line in group]
    if not shown:
        return []
    slack = 2 * median(line.size for line in shown)
    edges = (
        -_outermost([-line.box.x0 for line in shown], slack),
        _outermost([line.box.x1 for line in shown], slack),
    )
    ends = [_soft_ends(group, edges) for group in groups]
    # What sticks out of the column ends for no reason that counts.
    inside = [line.box.x1 <= edges[1] for group in groups for line in group[:-1]]
    count = sum(soft and fits for soft, fits in zip(chain(*ends), inside, strict=True))
    wrapped = count >= _WRAPPED * len(going_on)
    blocks: list[Block] = []
    for group, soft in zip(groups, ends, strict=True):
        blocks += _split(group, soft if wrapped else _hyphenated(group))
    return blocks


def _outermost(edges: Sequence[float], slack: float) -> float:
    """The largest, but for a single line that sticks out of its column."""
    *_, second, first = (float("-inf"), *sorted(edges))
    return second if len(edges) > 3 and first - second > slack else first


def _groups(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines of one font size and one step."""
    steps = [b.baseline - a.baseline for a, b in zip(lines, lines[1:], strict=False)]
    usual = median(steps) if steps else 0.0
    groups: list[list[Line]] = []
    own: list[float] = []
    for number, line in enumerate(lines):
        if number:
            before = lines[number - 1]
            step = steps[number - 1]
            small, large = sorted((before.size, line.size))
            # The group's own step where it has one; a region of headings has none that counts.
            expected = median(own) if own else min(usual, 1.6 * large)
            if large <= _LARGER * small and step <= _WIDER * max(expected, large):
                groups[-1].append(line)
                own.append(step)
                continue
        groups.append([line])
        own = []
    return groups


def _soft_ends(group: Sequence[Line], edges: tuple[float, float]) -> list[bool]:
    """For each line but the last whether it ended for want of room."""
    rights = [line.box.x1 for line in group]
    slack = 0.3 * group[0].size
    own = _ends(group, min(line.box.x0 for line in group), max(rights))
    flush = max(rights[:-1], default=0) - min(rights[:-1], default=0) < slack
    if all(own) and len(group) > (2 if flush else 3) and max(rights) - rights[-1] > slack:
        # A paragraph narrower than the column, such as a quotation.
        return own
    return _ends(group, *edges)


def _ends(group: Sequence[Line], left: float, right: float) -> list[bool]:
    return [_is_soft(a, b, left, right) for a, b in zip(group, group[1:], strict=False)]


def _is_soft(before: Line, line: Line, left: float, right: float) -> bool:
    first = line.words[0]
    if _hyphenated([before, line])[0]:
        return True
    if _BULLET.match(first.text) or _has_cells(before):
        return False
    room = before.box.x0 - left if before.rtl else right - before.box.x1
    if first.text and is_wide(first.text[0]):
        # Such scripts break between any two characters.
        return first.size > room
    if first.box.width + 0.25 * first.size > room:
        return True
    # A single line that sticks out of its column must not make breaks of all others.
    last = before.words[-1].text
    goes_on = first.text[:1].islower() and (last[-1:].isalpha() or last.endswith(","))
    return goes_on and before.box.width > _LONG * (right - left)


def _has_cells(line: Line) -> bool:
    """Whether words stand so far apart that they are the row of a table."""
    words = sorted(line.words, key=lambda word: word.box.x0)
    gaps = (b.box.x0 - a.box.x1 for a, b in zip(words, words[1:], strict=False))
    return max(gaps, default=0.0) > _CELL_GAP * line.size


def _hyphenated(group: Sequence[Line]) -> list[bool]:
    return [
        parts_a_word(before.words[-1].text) and line.words[0].text[:1].islower()
        for before, line in zip(group, group[1:], strict=False)
    ]


def _split(group: Sequence[Line], soft: Sequence[bool]) -> list[Block]:
    """Part a group where a paragraph or an entry begins."""
    blocks = [Block([group[0]], [])]
    for line, runs_on in zip(group[1:], soft, strict=True):
        if _begins(blocks[-1], line, runs_on):
            blocks.append(Block([line], []))
        else:
            blocks[-1].lines.append(line)
            blocks[-1].soft.append(runs_on)
    return blocks


def _begins(block: Block, line: Line, runs_on: bool) -> bool:
    before = block.lines[-1]
    start = min(other.indent for other in block.lines)
    indent = (line.indent - start) / line.size
    least, most = _INDENT
    if runs_on:
        # After a full last line the indent alone tells; not after a first line, where the rest
        # of an entry may be indented.
        flush = len(block.lines) > 1 and before.indent - start < 0.3 * line.size
        hyphen = parts_a_word(before.words[-1].text)
        return flush and not hyphen and least < indent < most
    if _BULLET.match(line.words[0].text) or not line.fonts & before.fonts:
        return True
    return abs(indent) > least and not _is_centred(before, line)


def _is_centred(one: Line, other: Line) -> bool:
    middles = [(line.box.x0 + line.box.x1) / 2 for line in (one, other)]
    return abs(middles[0] - middles[1]) < 0.5 * one.size
