"""Numbers as people write them: tokens, parameters and bytes, there and back."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from megatron_vlm.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = ("bytes", "kB", "MB", "GB", "TB", "PB")
_MOST_DIGITS = 4300
"""Where Python stops turning text into integers."""


def parse_count(text: str, name: str) -> int:
    """A number of things from `1e12`, `1T`, `500B`, `2.5M`, `10K` or `123`.

    Args:
        text: what was typed.
        name: what errors call it.

    Raises:
        ConfigError: it is none of these, no whole number, or below 1.
    """
    found = re.fullmatch(r"([\d_.]+(?:[eE][+]?\d{1,2})?)([KMBT]?)", text.strip(), re.IGNORECASE)
    number = Decimal(0)
    if found and len(text) <= _MOST_DIGITS:
        try:
            number = Decimal(found[1].replace("_", "")) * _UNITS[found[2].upper()]
        except InvalidOperation:
            number = Decimal(0)
    if number < 1 or number != int(number):
        raise ConfigError(
            f"{name} {text}: expected a whole number of at least 1, such as 1T, 500B, 2M or 1e12"
        )
    return int(number)


def count_in_words(number: int) -> str:
    """Three digits and a unit: `1.02T`, `500B`, `12.3M`, `640`. Never rounded up: what has not been
    reached is not said."""
    unit = next((unit for unit in "TBMK" if number >= _UNITS[unit]), "")
    if not unit:
        return str(number)
    whole, rest = divmod(number, _UNITS[unit])
    digits = max(0, 3 - len(str(whole)))
    part = str(rest).zfill(len(str(_UNITS[unit])) - 1)[:digits].rstrip("0")
    return f"{whole}{'.' if part else ''}{part}{unit}"


def bytes_in_words(number: float) -> str:
    """A size in decimal units: `3.21 GB`."""
    for unit in _BYTES:
        if number < 1000 or unit == _BYTES[-1]:
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.3g} {unit}"
