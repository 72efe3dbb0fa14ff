"""Reads a LLaVA-style JSON list: what a sample may look like, and why one is turned down.

A bad file stops the build; a bad sample is a reason to leave that sample out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.data.chat import Role, Turn
from megatron_vlm.data.ordered import Reserve
from megatron_vlm.errors import DataError

MAX_ENCODED_BYTES = 512 * 2**20
"""Most bytes of picture files that one sample may have. Our choice."""

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One checked entry of the list; its pictures are not yet read."""

    turns: list[Turn]
    """The conversation."""
    images: list[str]
    """Paths of its pictures, relative to the image root."""


def read_source(path: Path) -> list[Any]:
    """The raw entries of a LLaVA-style JSON file.

    Raises:
        DataError: missing, not JSON, not a list, or empty.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a JSON file of conversations"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend the file") from error
    if not isinstance(content, list) or not content:
        found = "an empty list" if content == [] else type(content).__name__
        raise DataError(
            f"{path}: holds {found}; expected a list of "
            '{"id", "image" or "images", "conversations"}'
        )
    return content


def parse_sample(entry: Any) -> SourceSample:
    """Check one entry.

    Raises:
        DataError: the reason why it cannot be a sample; names the field.
    """
    if not isinstance(entry, dict):
        raise DataError(f"entry is {type(entry).__name__}; expected an object")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations: expected a list of at least one turn")
    return SourceSample([_turn(i, turn) for i, turn in enumerate(turns)], _images(entry))


def read_image_files(root: Path, names: Sequence[str], reserve: Reserve) -> list[bytes]:
    """The bytes of a sample's pictures inside the image root.

    Args:
        root: resolved folder that pictures must lie in, links followed.
        names: paths relative to it.
        reserve: called with the bytes of all of them before any is read.

    Raises:
        DataError: one is outside the root, missing or not a regular file, or together they
            exceed `MAX_ENCODED_BYTES`.
    """
    found = [(name, *_find_image(root, name)) for name in names]
    total = 0
    for name, _, size in found:
        total += size
        if total > MAX_ENCODED_BYTES:
            raise DataError(
                f"image {name!r}: {size} bytes, {total} with those before it; at most "
                f"{MAX_ENCODED_BYTES} are read for one sample"
            )
    reserve(total)
    return [_read_image(name, path, size) for name, path, size in found]


def _find_image(root: Path, name: str) -> tuple[Path, int]:
    """Where it is, and its size in bytes."""
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise DataError(
                f"image {name!r}: lies outside the image root; move it there or set --image-root"
            )
        # A pipe or a device would block or never end.
        if not path.is_file():
            raise DataError(f"image {name!r}: no such file below the image root")
        return path, path.stat().st_size
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"image {name!r}: cannot be read ({error})") from error


def _read_image(name: str, path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            encoded = file.read(size + 1)
    except OSError as error:
        raise DataError(f"image {name!r}: cannot be read ({error})") from error
    if len(encoded) != size:
        raise DataError(f"image {name!r}: changed its size while it was read; build again")
    return encoded


def _turn(number: int, turn: Any) -> Turn:
    field = f"conversations[{number}]"
    if not isinstance(turn, dict):
        raise DataError(f"{field}: is {type(turn).__name__}; expected an object")
    speaker, text = turn.get("from"), turn.get("value")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(f"{field}.from: {speaker!r}; expected one of {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"{field}.value: is {type(text).__name__}; expected a string")
    return Turn(role, text)


def _images(entry: dict[str, Any]) -> list[str]:
    given = [name for name in ("image", "images") if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError("image, images: both are given; keep one")
    if not given:
        return []
    value = entry[given[0]]
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{given[0]}: expected a path or a list of paths")
    return names
