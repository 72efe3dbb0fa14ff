"""Pictures and videos as an entry names them: a path below the media root, or a data URI.

Nothing is ever downloaded, and nothing outside the root is opened.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from megatron_vlm.data.draft import Medium
from megatron_vlm.data.sources.byte_ranges import ByteRange, shortened
from megatron_vlm.data.sources.strict_json import write_json
from megatron_vlm.errors import DataError

MAX_ENCODED_BYTES = 512 * 2**20
"""Most bytes of pictures and videos that one sample may have. Our choice."""

MediumKind: TypeAlias = Literal["image", "video"]

FindMedium = Callable[[Any, MediumKind], Medium]
"""Turns what an entry calls a picture or a video into the medium. Raises DataError."""

PICTURE_EXTENSIONS = frozenset(
    "png jpg jpeg jfif mpo webp gif bmp tif tiff ppm pgm pbm pnm jp2 avif".split()
)
"""Of pictures that the builder may decode; in lower case, without the dot."""

VIDEO_EXTENSIONS = frozenset("mp4 m4v mov mkv webm avi mpg mpeg ts wmv flv ogv 3gp".split())
"""Of videos, likewise."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI = re.compile(r"data:(image|video)/[\w.+-]+((?:;[\w.+-]+=[\w.+-]+)*);base64,")


@dataclass(frozen=True, slots=True)
class MediaFolder:
    """The media root of a source, and what may be named in it."""

    root: Path
    """Resolved; everything lies below it, links followed."""

    @classmethod
    def open(cls, root: Path) -> MediaFolder:
        """Take a folder as the root.

        Raises:
            DataError: there is none.
        """
        resolved = root.resolve()
        if not resolved.is_dir():
            raise DataError(f"image root {root}: no such folder; set --image-root")
        return cls(resolved)

    def find(self, named: Any, kind: MediumKind) -> Medium:
        """The medium that an entry names: a path, a `file://` path, a data URI, an object with
        one of these under `path`, `url`, `image` or `video`, or with the `bytes` themselves.

        Raises:
            DataError: none of these, an address, outside the root, missing, no regular file, or
                larger than `MAX_ENCODED_BYTES`.
        """
        if isinstance(named, dict):
            return self._find_in(named, kind)
        if not isinstance(named, str) or not named:
            raise DataError(f"{kind}: is {shortened(named)}; expected a path or a data URI")
        if named[:5].lower() == "data:":
            return from_data_uri(named, kind)
        if named.startswith("file://"):
            return self._find_file(named.removeprefix("file://"), kind)
        if _ADDRESS.match(named):
            raise DataError(
                f"{kind} {shortened(named)}: is an address; nothing is downloaded, so fetch it "
                "first and give its path"
            )
        return self._find_file(named, kind)

    def _find_in(self, named: dict[str, Any], kind: MediumKind) -> Medium:
        content = named.get("bytes")
        if isinstance(content, bytes):
            name = named.get("path")
            return from_bytes(content, kind, name if isinstance(name, str) else "without a name")
        for key in ("path", "url", kind):
            if isinstance(named.get(key), str):
                return self.find(named[key], kind)
        raise DataError(
            f"{kind}: an object with {', '.join(map(repr, named))[:200] or 'no field'}; expected "
            "its path"
        )

    def _find_file(self, name: str, kind: MediumKind) -> Medium:
        quoted = f"{kind} {shortened(name)}"
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise DataError(
                    f"{quoted}: lies outside the image root; move it there or set --image-root"
                )
            # A pipe or a device would block or never end.
            if not path.is_file():
                raise DataError(f"{quoted}: no such file below the image root")
            size = path.stat().st_size
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"{quoted}: cannot be read ({error})") from error
        _check_size(size, quoted)
        return Medium(name, size, ByteRange(path, 0, size, quoted).read)


def from_bytes(content: bytes, kind: MediumKind, name: str) -> Medium:
    """A medium whose bytes are in memory already.

    Raises:
        DataError: larger than `MAX_ENCODED_BYTES`.
    """
    _check_size(len(content), f"{kind} {shortened(name)}")
    return Medium(name, len(content), partial(_same, content))


def from_data_uri(uri: str, kind: MediumKind) -> Medium:
    """The medium that a base64 data URI spells.

    Raises:
        DataError: not such a URI, of the other kind, or damaged.
    """
    match = _DATA_URI.match(uri)
    if match is None or match[1] != kind:
        raise DataError(
            f"{kind} {shortened(uri)}: not a data URI of {kind}/... in base64; write it as "
            f"data:{kind}/...;base64,..."
        )
    try:
        content = base64.b64decode(uri[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{kind} {shortened(uri)}: not valid base64 ({error})") from error
    return from_bytes(content, kind, uri[: match.end() - 1])


def entry_json(value: Any) -> bytes:
    """An entry as it is kept beside its samples: data URIs and bytes give way to their length.

    Raises:
        DataError: nested too deeply.
    """
    try:
        return write_json(_without_media(value))
    except RecursionError as error:
        raise DataError("nested too deeply to be kept; flatten it") from error


def _without_media(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_media(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_media(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str) and (match := _DATA_URI.match(value)):
        return f"{match[0]}<{len(value) - match.end()} characters>"
    if isinstance(value, float) and not math.isfinite(value):
        # Parquet writes so what is missing; JSON has no such number.
        return None
    return value


def _check_size(size: int, quoted: str) -> None:
    if size > MAX_ENCODED_BYTES:
        raise DataError(
            f"{quoted}: {size} bytes; at most {MAX_ENCODED_BYTES} are read for one sample"
        )


def _same(content: bytes) -> bytes:
    return content
