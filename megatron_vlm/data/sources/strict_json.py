"""JSON from files that nobody vouches for: what no other reader would take is refused here too."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_vlm.errors import DataError


def parse_json(encoded: bytes) -> Any:
    """The value that UTF-8 JSON spells.

    Raises:
        DataError: not UTF-8, not JSON, a number that is not finite, or nested too deeply.
    """
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 at byte {error.start} (0x{encoded[error.start]:02x}); "
            "write it again as UTF-8"
        ) from error
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise DataError("nested too deeply to be read; flatten it") from error
    except ValueError as error:
        raise DataError(f"not valid JSON ({error}); mend it") from error


def write_json(value: Any) -> bytes:
    """ASCII JSON in one line; what JSON has no form for (a date of Parquet) is written as text.

    Raises:
        DataError: nested too deeply, or a number that is not finite.
    """
    try:
        return json.dumps(value, allow_nan=False, default=str).encode()
    except RecursionError as error:
        raise DataError("nested too deeply to be written; flatten it") from error
    except ValueError as error:
        raise DataError(f"cannot be written as JSON ({error})") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number
