"""What every part of the page is written with: text made safe, and numbers of things."""

from __future__ import annotations

from html import escape

from megatron_vlm.data.look.characters import visible


def safe(text: str, keep: str = "") -> str:
    """Text of data for a page, in an element or in an attribute's quotes.

    Args:
        text: any.
        keep: characters without a shape that stay as they are.
    """
    return escape(visible(text, keep), quote=True)


def counted(number: int, thing: str) -> str:
    """For example `1 sample` or `1,024 samples`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(told: list[str]) -> str:
    """Short facts side by side, made safe."""
    return safe(" \u00b7 ".join(told))
