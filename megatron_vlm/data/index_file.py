"""The file of an index: flat columns that are checked in pieces, then mapped.

The file is a safetensors one. It is checked with plain reads of small pieces, because a pass over
the mapping would count every page of it as this process's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from megatron_vlm.data.draft import SampleKind
from megatron_vlm.data.format import COLUMNS, FORMAT_VERSION, column_length
from megatron_vlm.errors import DataError

_SAFETENSORS_NAMES = {"int32": "I32", "int64": "I64"}
_PIECE = 1 << 16
"""Entries that are checked at a time: few enough to stay in a core's cache, and even, so that no
pair of samples is parted."""


class Limits(NamedTuple):
    """What the columns must fit."""

    samples: int
    pictures: int
    shard_sizes: tuple[int, ...]
    origins: int
    kind: SampleKind


class Place(NamedTuple):
    """Where a column's entries lie in the file."""

    offset: int
    length: int


def write_columns(
    path: Path,
    samples: int,
    pictures: int,
    pieces: Callable[[str], Iterable[NDArray[Any]]],
) -> tuple[int, str]:
    """Write an index file, column by column, without holding a column.

    Args:
        path: the file.
        samples: number of samples.
        pictures: number of pictures.
        pieces: gives a column's arrays in order, by its name.

    Returns:
        Bytes and hexadecimal SHA-256 of the file.

    Raises:
        OSError: the disk refuses.
    """
    # Eight-byte columns first keep all of them aligned.
    names = sorted(COLUMNS, key=lambda name: -np.dtype(COLUMNS[name]).itemsize)
    header: dict[str, Any] = {"__metadata__": {"format_version": str(FORMAT_VERSION)}}
    end = 0
    for name in names:
        length = column_length(name, samples, pictures)
        start, end = end, end + length * np.dtype(COLUMNS[name]).itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[COLUMNS[name]],
            "shape": [length],
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    written = 0
    with path.open("wb") as file:

        def write(content: Any) -> None:
            nonlocal written
            digest.update(content)
            written += file.write(content)

        write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in pieces(name):
                write(np.ascontiguousarray(piece, dtype=np.dtype(COLUMNS[name])).data)
    expected = 8 + len(text) + end
    if written != expected:
        raise RuntimeError(f"{path}: {written} bytes written, {expected} expected")
    return written, digest.hexdigest()


def find_columns(path: Path) -> dict[str, Place]:
    """Where each column lies.

    Raises:
        DataError: not an index file, or one with other columns.
    """
    try:
        # Checks the header, and that the columns fill the file.
        with safe_open(str(path), framework="np") as checked:
            names = set(checked.keys())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable index ({error}); build it again") from error
    if names != set(COLUMNS):
        raise DataError(
            f"{path}: columns missing or unknown: {sorted(names ^ set(COLUMNS))}; build it again"
        )
    places = {}
    for name, dtype in COLUMNS.items():
        entry = header[name]
        if entry["dtype"] != _SAFETENSORS_NAMES[dtype] or len(entry["shape"]) != 1:
            raise DataError(
                f"{path}: column {name} is {entry['dtype']}{entry['shape']}, expected one "
                f"dimension of {dtype}; build it again"
            )
        places[name] = Place(8 + header_bytes + entry["data_offsets"][0], entry["shape"][0])
    return places


def map_columns(path: Path, places: dict[str, Place]) -> dict[str, NDArray[Any]]:
    """Every column as a read-only array that is mapped from the file."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in COLUMNS.items():
        offset, length = places[name]
        if not length:  # an empty range cannot be mapped
            arrays[name] = np.empty(0, dtype)
            continue
        # As plain arrays: reading single entries through the memmap class is several times slower.
        arrays[name] = np.memmap(path, dtype, "r", offset, (length,)).view(np.ndarray)
    return arrays


def check_columns(path: Path, places: dict[str, Place], limits: Limits) -> None:
    """Check every entry that a planner or a reader relies on.

    Raises:
        DataError: a column has the wrong length, or an entry cannot be; names the sample or the
            picture.
    """
    for name, place in places.items():
        expected = column_length(name, limits.samples, limits.pictures)
        if place.length != expected:
            raise DataError(
                f"{path}: column {name} has {place.length} entries, but the data set implies "
                f"{expected}; build it again"
            )
    with path.open("rb") as file:
        columns = _Columns(path, file.fileno(), places)
        try:
            _check_samples(columns, limits)
            _check_pictures(columns, limits)
            _check_positions(columns, limits)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class _Columns:
    """Reads pieces of columns, each column into one buffer of its own."""

    def __init__(self, path: Path, descriptor: int, places: dict[str, Place]) -> None:
        self.path = path
        self._descriptor = descriptor
        self._places = places
        self._buffers = {name: np.empty(_PIECE + 1, COLUMNS[name]) for name in COLUMNS}

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Entries [start, stop), valid until the column is read again."""
        array = self._buffers[name][: stop - start]
        view = array.view(np.uint8).data
        offset = self._places[name].offset + start * array.itemsize
        done = 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not count:
                raise DataError(f"{self.path}: ends early; copy it again or build it again")
            done += count
        return array

    def require(self, fits: NDArray[np.bool_], first: int, owner: str, what: str) -> None:
        """Raises DataError for the first entry that does not fit."""
        if not fits.all():
            number = first + int(np.argmin(fits))
            raise DataError(
                f"{self.path}: {owner} {number} {what}; the index is damaged: build it again"
            )


def _check_samples(columns: _Columns, limits: Limits) -> None:
    sizes = np.asarray(limits.shard_sizes, dtype=np.int64)
    pairs = limits.kind == "preference"
    if pairs and limits.samples % 2:
        raise DataError(
            f"{columns.path}: {limits.samples} samples, but a preference set has pairs; the index "
            "is damaged: build it again"
        )
    for first in range(0, limits.samples, _PIECE):
        stop = min(first + _PIECE, limits.samples)

        def read(name: str, first: int = first, stop: int = stop) -> NDArray[Any]:
            return columns.read(f"sample_{name}", first, stop)

        def require(fits: NDArray[np.bool_], what: str, first: int = first) -> None:
            columns.require(fits, first, "sample", what)

        text, loss, size = read("text_tokens"), read("loss_tokens"), read("size")
        entry, draft, origin = read("entry"), read("draft"), read("origin")
        require(_inside(read("shard"), read("offset"), size, sizes), "points outside its shards")
        require((text >= 1) & (loss >= 0) & (loss <= text), "has impossible numbers of tokens")
        # Two numbers of four bytes a token, and a header.
        require(size >> 3 >= text, "has fewer bytes than tokens")
        require((entry >= 0) & (draft >= 0), "has no place in its source")
        require((origin >= 0) & (origin < limits.origins), "comes from no known file")
        if pairs:
            fits = (entry[::2] == entry[1::2]) & (draft[::2] == 0) & (draft[1::2] == 1)
            require(np.repeat(fits, 2), "is not one of a pair")
        start = columns.read("sample_picture_start", first, stop + 1)
        fits = (start[1:] >= start[:-1]) & (start[1:] <= limits.pictures)
        fits[0] &= bool(first or start[0] == 0)
        fits[-1] &= bool(stop < limits.samples or start[-1] == limits.pictures)
        require(fits, "has impossible pictures")


def _check_pictures(columns: _Columns, limits: Limits) -> None:
    sizes = np.asarray(limits.shard_sizes, dtype=np.int64)
    for first in range(0, limits.pictures, _PIECE):
        stop = min(first + _PIECE, limits.pictures)

        def read(name: str, first: int = first, stop: int = stop) -> NDArray[Any]:
            return columns.read(f"picture_{name}", first, stop)

        def require(fits: NDArray[np.bool_], what: str, first: int = first) -> None:
            columns.require(fits, first, "picture", what)

        inside = _inside(read("shard"), read("offset"), read("size"), sizes)
        require(inside, "points outside its shards")
        require((read("height") >= 1) & (read("width") >= 1), "has a side below 1")
        require(read("max_tokens") >= 0, "has a negative number of tokens")


def _check_positions(columns: _Columns, limits: Limits) -> None:
    """Placeholders ascend within their sample, and are among its text tokens."""
    for first in range(0, limits.samples, _PIECE):
        stop = min(first + _PIECE, limits.samples)
        start = columns.read("sample_picture_start", first, stop + 1)
        text = columns.read("sample_text_tokens", first, stop)
        # The pictures of these samples may be many more than the samples.
        for low in range(int(start[0]), int(start[-1]), _PIECE):
            high = min(low + _PIECE, int(start[-1]))
            before = max(low - 1, 0)
            position = columns.read("picture_position", before, high)
            ascends = np.ones(high - low, np.bool_)
            ascends[0 if low else 1 :] = position[1:] > position[:-1]
            bounds = np.clip(start, low, high)
            begins = start[:-1][(bounds[1:] > bounds[:-1]) & (start[:-1] >= low)]
            ascends[begins - low] = position[begins - before] >= 0
            below = position[low - before :] < np.repeat(text, np.diff(bounds))
            columns.require(
                ascends & below, low, "picture", "has an impossible place in its sample"
            )


def _inside(
    shard: NDArray[np.int32],
    offset: NDArray[np.int64],
    size: NDArray[np.int64],
    shard_sizes: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether each range of bytes lies in its shard."""
    known = (shard >= 0) & (shard < len(shard_sizes))
    if not known.all():
        return known
    # Subtracted, since a sum of damaged numbers may overflow.
    fits: NDArray[np.bool_] = (offset >= 0) & (size >= 0) & (offset <= shard_sizes[shard] - size)
    return fits
