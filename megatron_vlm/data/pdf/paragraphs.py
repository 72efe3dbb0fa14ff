"""From the words of one region to lines, from lines to blocks, from blocks to text.

A block is a paragraph, a heading, a list entry or a few lines that belong together. Inside it a
line's end is a space where the text merely ran out of room, and a line break where it did not:
the next word would have fitted.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from megatron_vlm.data.pdf.chars import Word
from megatron_vlm.data.pdf.frames import Box

SOFT_HYPHEN = "\u00ad"
_HYPHENS = ("-", "\u2010", SOFT_HYPHEN)
_BULLET = re.compile(r"[\u2022\u25aa\u25cf\u25e6\u2013\u2014\u2043\u27a2\u2713*+-]$")
_TOKEN = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


@dataclass(slots=True)
class Line:
    """Words on one baseline, in reading order."""

    words: list[Word]
    size: float
    baseline: float
    rtl: bool
    """Whether it is read from right to left."""
    box: Box = field(init=False)

    def __post_init__(self) -> None:
        """Find its box."""
        self.box = self.words[0].box
        for word in self.words[1:]:
            self.box = self.box.joined(word.box)

    @property
    def font(self) -> int:
        """The font of most of its characters."""
        fonts: Counter[int] = Counter()
        for word in self.words:
            fonts[word.font] += len(word.text)
        return fonts.most_common(1)[0][0]


@dataclass(slots=True)
class Block:
    """Lines that belong together; `soft[i]` says whether line i runs on into line i + 1."""

    lines: list[Line]
    soft: list[bool]

    @property
    def box(self) -> Box:
        """Around all of its lines."""
        box = self.lines[0].box
        for line in self.lines[1:]:
            box = box.joined(line.box)
        return box

    @property
    def size(self) -> float:
        """Its usual font size, in points."""
        return median(line.size for line in self.lines)


def blocks(words: Sequence[Word]) -> list[Block]:
    """The blocks of one region, from top to bottom."""
    lines = _lines(words)
    if not lines:
        return []
    left = min(line.box.x0 for line in lines)
    right = max(line.box.x1 for line in lines)
    steps = [b.baseline - a.baseline for a, b in zip(lines, lines[1:], strict=False)]
    usual = median(steps) if steps else 0.0
    found = [Block([lines[0]], [])]
    for before, line in zip(lines, lines[1:], strict=False):
        block = found[-1]
        soft = _runs_on(before, line, left, right)
        if _starts_block(block, line, soft, usual):
            found.append(Block([line], []))
        else:
            block.lines.append(line)
            block.soft.append(soft)
    return found


def block_text(block: Block, vocabulary: Counter[str] | None = None) -> str:
    """What a block says.

    Args:
        block: its lines.
        vocabulary: `page_vocabulary`, which tells a hyphen that the line's end brought from
            that of a compound.
    """
    text = _line_text(block.lines[0])
    for line, soft in zip(block.lines[1:], block.soft, strict=True):
        text = join(text, _line_text(line), soft, vocabulary)
    return normalise(text)


def join(before: str, after: str, soft: bool, vocabulary: Counter[str] | None = None) -> str:
    """Two lines as one text, a hyphen that parts a word undone."""
    if not before or not after:
        return before + after
    if not soft:
        return before + "\n" + after
    if before.endswith(_HYPHENS) and len(before) > 1 and before[-2].isalpha():
        if before.endswith(SOFT_HYPHEN):
            return before[:-1] + after
        if after[0].islower() and not _is_compound(before, after, vocabulary or Counter()):
            return before[:-1] + after
        return before + after
    if _is_wide(before[-1]) and _is_wide(after[0]):
        return before + after
    return before + " " + after


def page_vocabulary(words: Iterable[Word]) -> Counter[str]:
    """How often each word of a page occurs, in lower case."""
    return Counter(
        token.lower() for word in words for token in _TOKEN.findall(normalise(word.text))
    )


def normalise(text: str) -> str:
    """Ligatures and presentation forms as plain letters, composed accents, nothing invisible."""
    plain = "".join(
        unicodedata.normalize("NFKC", char) if _is_presentation_form(char) else char
        for char in text
        if char == "\n" or unicodedata.category(char) not in ("Cf", "Cc")
    )
    return unicodedata.normalize("NFC", plain)


def is_right_to_left(text: str) -> bool:
    """Whether most of its letters are of a script that is read from right to left."""
    balance = 0
    for char in text:
        direction = unicodedata.bidirectional(char)
        balance += (direction in ("R", "AL")) - (direction == "L")
    return balance > 0


def _lines(words: Sequence[Word]) -> list[Line]:
    lines: list[list[Word]] = []
    baseline = size = 0.0
    for word in sorted(words, key=lambda word: word.baseline):
        if not lines or word.baseline - baseline > 0.45 * max(size, word.size):
            lines.append([])
            baseline, size = word.baseline, 0.0
        lines[-1].append(word)
        # A line is where its largest words stand: an index before it is not its baseline.
        if word.size >= size:
            baseline, size = word.baseline, word.size
    return [_line(found) for found in lines]


def _line(words: list[Word]) -> Line:
    rtl = is_right_to_left("".join(word.text for word in words))
    if rtl:
        # The library has brought these into the order in which they are read.
        words = sorted(words, key=lambda word: word.place)
    else:
        words = sorted(words, key=lambda word: word.box.x0)
    sizes: Counter[float] = Counter()
    for word in words:
        sizes[round(word.size, 1)] += len(word.text)
    size = max(sizes.most_common(1)[0][0], 0.1)
    main = [word.baseline for word in words if abs(word.size - size) <= 0.1]
    return Line(words, size, median(main or [words[0].baseline]), rtl)


def _line_text(line: Line) -> str:
    text = ""
    for number, word in enumerate(line.words):
        if number and text and word.text and _is_spaced(line.words[number - 1], word):
            text += " "
        text += word.text
    return text


def _is_spaced(before: Word, word: Word) -> bool:
    if word.place == before.place + 1 and word.spaced:
        return True
    gap = max(word.box.x0 - before.box.x1, before.box.x0 - word.box.x1)
    return gap > 0.12 * min(before.size, word.size)


def _runs_on(before: Line, line: Line, left: float, right: float) -> bool:
    """Whether the line before ended for want of room, or inside a word."""
    first = line.words[0]
    last = before.words[-1].text
    if last.endswith(_HYPHENS) and last[-2:-1].isalpha() and first.text[:1].islower():
        return True
    if _BULLET.match(first.text):
        return False
    room = before.box.x0 - left if before.rtl else right - before.box.x1
    need = first.box.width
    if first.text and _is_wide(first.text[0]):
        # Scripts without spaces break between any two characters.
        need = min(need, first.size)
    else:
        need += 0.25 * first.size
    return need > room


def _starts_block(block: Block, line: Line, soft: bool, usual: float) -> bool:
    before = block.lines[-1]
    small, large = sorted((before.size, line.size))
    if large > 1.15 * small:
        return True
    step = line.baseline - before.baseline
    steps = [b.baseline - a.baseline for a, b in zip(block.lines, block.lines[1:], strict=False)]
    # The block's own step where it has one; else the region's, which headings alone would spoil.
    expected = median(steps) if steps else min(usual, 1.6 * large)
    if step > 1.25 * max(expected, large):
        return True
    if soft:
        return False
    if line.font != before.font and not _shares_font(line, before):
        return True
    if _BULLET.match(line.words[0].text):
        return True
    # An indented first line, or one that sticks out before an indented rest.
    start = min(_indent(other, line.rtl) for other in block.lines)
    indent = abs(_indent(line, line.rtl) - start)
    return indent > 0.8 * line.size and not _is_centred(before, line)


def _indent(line: Line, rtl: bool) -> float:
    return -line.box.x1 if rtl else line.box.x0


def _shares_font(one: Line, other: Line) -> bool:
    return bool({word.font for word in one.words} & {word.font for word in other.words})


def _is_centred(one: Line, other: Line) -> bool:
    middles = [(line.box.x0 + line.box.x1) / 2 for line in (one, other)]
    return abs(middles[0] - middles[1]) < 0.5 * one.size


def _is_compound(before: str, after: str, vocabulary: Counter[str]) -> bool:
    """Whether the hyphen between them belongs to the word, as the rest of the page shows."""
    head = re.search(r"[^\W\d_]+(?:-[^\W\d_]+)*-$", before)
    tail = _TOKEN.match(after)
    if not head or not tail:
        return False
    with_hyphen = (head[0] + tail[0]).lower()
    without = (head[0][:-1] + tail[0]).lower()
    return vocabulary[with_hyphen] > vocabulary[without]


def _is_presentation_form(char: str) -> bool:
    return "\ufb00" <= char <= "\ufdff" or "\ufe70" <= char <= "\ufefc" or char == "\u00a0"


def _is_wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in ("W", "F")
