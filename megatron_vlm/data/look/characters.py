"""Text of data where it is shown: what cannot be seen, or could do something, is named.

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


def visible(text: str, keep: str = "") -> str:
    """The text with the code point, as `[U+202E]`, of every character that has no shape.

    Unpaired surrogates, which no file could hold, are among them.

    Args:
        text: any.
        keep: characters that stay as they are.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(
        f"[U+{ord(c):04X}]" if unicodedata.category(c) in _UNSEEN and c not in keep else c
        for c in text
    )
