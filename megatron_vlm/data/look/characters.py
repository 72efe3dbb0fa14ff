"""Text of data where it is shown: what cannot be seen, or could do something, gets a sign.

Control characters, marks that turn the direction of writing, and characters without a shape are
what one looks for in data, and what could drive a reader's page.
"""

from __future__ import annotations

import re
import unicodedata

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""General categories without a shape of their own: controls, formats, surrogates, private and
unassigned ones, separators of lines and paragraphs."""

_PLAIN = re.compile(r"[ -~\xa1-\xac\xae-\u0377]*")
_DELETE = 0x7F


def visible(text: str, keep: str = "") -> str:
    """The text with a sign for every character that has no shape.

    C0 controls become Unicode's control pictures (a line break: U+240A), all others their code
    point, as `[U+202E]`. An unpaired surrogate, which no file could hold, does too.

    Args:
        text: any.
        keep: characters that stay as they are.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(c if c in keep else _sign(c) for c in text)


def _sign(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == _DELETE else f"[U+{code:04X}]"
