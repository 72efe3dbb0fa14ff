"""The lines of one region: which words stand on one baseline, and in which order."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_vlm.data.pdf.chars import Word
from megatron_vlm.data.pdf.frames import Box
from megatron_vlm.data.pdf.wording import is_right_to_left


@dataclass(frozen=True, slots=True)
class Line:
    """Words on one baseline, in reading order."""

    words: list[Word]
    box: Box
    baseline: float
    size: float
    """Font size of most of its characters, in points."""
    rtl: bool
    """Whether it is read from right to left."""

    @property
    def fonts(self) -> set[int]:
        """The fonts of its words."""
        return {word.font for word in self.words}

    @property
    def indent(self) -> float:
        """Where it begins, from an edge that is the same for all lines of its direction."""
        return -self.box.x1 if self.rtl else self.box.x0

    def text(self) -> str:
        """Its words with the spaces between them."""
        text = ""
        for number, word in enumerate(self.words):
            if text and word.text and _is_spaced(self.words[number - 1], word):
                text += " "
            text += word.text
        return text


def lines_of(words: Sequence[Word]) -> list[Line]:
    """Lines from top to bottom; words that are raised or lowered a little are part of one."""
    lines: list[list[Word]] = []
    baseline = size = 0.0
    for word in sorted(words, key=lambda word: word.baseline):
        # An index is on the line of its word; a line beside a large initial is not on its line.
        small, large = sorted((size, word.size))
        if not lines or word.baseline - baseline > 0.45 * min(large, 2 * small):
            lines.append([])
            baseline, size = word.baseline, word.size
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
    box = functools.reduce(Box.joined, (word.box for word in words))
    return Line(words, box, median(main or [words[0].baseline]), size, rtl)


def _is_spaced(before: Word, word: Word) -> bool:
    if word.place == before.place + 1 and word.spaced:
        return True
    gap = max(word.box.x0 - before.box.x1, before.box.x0 - word.box.x1)
    return gap > 0.12 * min(before.size, word.size)
