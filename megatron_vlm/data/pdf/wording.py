"""Text as it is read: hyphens at line ends undone, ligatures as letters, nothing invisible."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

SOFT_HYPHEN = "\u00ad"
HYPHENS = ("-", "\u2010", SOFT_HYPHEN)

_COMPOUND = r"[^\W\d_]+(?:-[^\W\d_]+)*"
_TOKEN = re.compile(_COMPOUND)
_HEAD = re.compile(f"{_COMPOUND}[-\u2010]$")


def join(before: str, after: str, soft: bool, vocabulary: Counter[str] | None = None) -> str:
    """Two lines as one text, a hyphen that parts a word undone.

    Args:
        before: a line.
        after: the next one.
        soft: whether the first ended for want of room alone; a line break if not.
        vocabulary: how often words occur; tells the hyphen of a compound from one that the
            line's end brought.
    """
    if not before or not after:
        return before + after
    if not soft:
        return before + "\n" + after
    if parts_a_word(before):
        if before.endswith(SOFT_HYPHEN):
            return before[:-1] + after
        if after[0].islower() and not _is_compound(before, after, vocabulary or Counter()):
            return before[:-1] + after
        return before + after
    if is_wide(before[-1]) and is_wide(after[0]):
        return before + after
    return before + " " + after


def parts_a_word(line: str) -> bool:
    """Whether a line ends in a letter and a hyphen."""
    return line.endswith(HYPHENS) and line[-2:-1].isalpha()


def vocabulary(words: Iterable[str]) -> Counter[str]:
    """How often each word occurs, in lower case."""
    return Counter(token.lower() for word in words for token in _TOKEN.findall(normalise(word)))


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


def is_wide(char: str) -> bool:
    """Whether it is of a script that writes no spaces, such as Chinese."""
    return unicodedata.east_asian_width(char) in ("W", "F")


def _is_compound(before: str, after: str, seen: Counter[str]) -> bool:
    head, tail = _HEAD.search(before), _TOKEN.match(after)
    if not head or not tail:
        return False
    start = head[0][:-1].lower()
    return seen[f"{start}-{tail[0].lower()}"] > seen[start + tail[0].lower()]


def _is_presentation_form(char: str) -> bool:
    return "\ufb00" <= char <= "\ufdff" or "\ufe70" <= char <= "\ufefc" or char == "\u00a0"
