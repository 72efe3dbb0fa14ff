"""Reading ranges of tensors from a folder of safetensors files, with no more memory than asked for.

A file is 8 bytes (the header's length, little-endian), a JSON header (dtype, shape and byte range
of each tensor) and the tensors. Headers are read and checked as a whole before any tensor is;
files are read by position, never mapped, so memory stays what is asked for.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint.stored import read_into
from megatron_vlm.errors import CheckpointError, ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""What may hold weights, by its name in a header."""

_MOST_HEADER_BYTES = 100_000_000
"""As in the safetensors library."""
_MOST_JSON_BYTES = 1 << 28
_MOST_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies."""

    file: str
    dtype: str
    """As the header says; not only what may hold weights."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the file's beginning."""


class SafetensorsFolder:
    """The tensors of a folder by name; a context manager."""

    def __init__(self, path: Path) -> None:
        """Read the index and every header.

        Raises:
            ConversionError: a file is missing, truncated or damaged, or index and files disagree.
        """
        self.path = path
        self._files: OrderedDict[str, int] = OrderedDict()
        self.entries: dict[str, Entry] = {}
        with read_errors(path):
            listed = _listed_files(path)
        for file in sorted(set(listed.values())):
            with read_errors(path / file):
                header = _read_header(path / file)
            for name, entry in header.items():
                if name in self.entries:
                    raise ConversionError(
                        f"{path}: {name} is both in {self.entries[name].file} and in {file}; "
                        "remove one of them"
                    )
                self.entries[name] = entry
        if listed.keys() == {""}:
            return
        for name, file in listed.items():
            if name not in self.entries or self.entries[name].file != file:
                raise ConversionError(
                    f"{path / INDEX}: says that {name} is in {file}, which does not hold it; "
                    "download both again"
                )
        unlisted = self.entries.keys() - listed.keys()
        if unlisted:
            name = min(unlisted)
            raise ConversionError(
                f"{path / INDEX}: does not list {name}, which {self.entries[name].file} holds; "
                "download both again"
            )

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` `[count]`, of the tensor's dtype, with its elements from `start` on."""
        entry = self.entries[name]
        place = entry.offset + start * out.itemsize
        try:
            with read_errors(self.path / entry.file):
                read_into(self._open(entry.file), place, out, f"{self.path / entry.file} ({name})")
        except CheckpointError as error:
            raise ConversionError(str(error)) from None

    def _open(self, file: str) -> int:
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        if len(self._files) >= _MOST_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[file] = os.open(self.path / file, os.O_RDONLY)
        return self._files[file]


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses to give into one line about the file, or about `path`."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"{error.filename or path}: cannot be read ({error.strerror or error}); expected a "
            "file that this user may read: correct that, or take another copy"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConversionError: it is missing or holds something else.
    """
    try:
        with read_errors(path):
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise ConversionError(
                    f"{path}: missing; expected a folder that transformers can load"
                ) from None
            if size > _MOST_JSON_BYTES:
                raise ConversionError(f"{path}: has more than {_MOST_JSON_BYTES} bytes; not opened")
            found = json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: holds a {type(found).__name__}; expected an object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated!r} stands there twice")
    return found


def _listed_files(path: Path) -> dict[str, str]:
    """The file of each tensor, as the index says; one nameless tensor where there is no index."""
    index, single = path / INDEX, path / SINGLE
    if index.exists() and single.exists():
        raise ConversionError(f"{path}: has both {INDEX} and {SINGLE}; remove the one that is old")
    if not index.exists():
        if single.exists():
            return {"": SINGLE}
        pickled = sorted(path.glob("pytorch_model*.bin"))
        hint = f"; {pickled[0].name} is a pickle, which is never opened" if pickled else ""
        parts = sorted(path.glob("*.safetensors"))
        if parts:
            raise ConversionError(
                f"{path}: has weights ({parts[0].name}; {len(parts)} safetensors in all), but no "
                f"{INDEX}, which says what lies in which; download that file too"
            )
        raise ConversionError(f"{path}: has neither {INDEX} nor {SINGLE}{hint}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConversionError(f"{index}: has no weight_map; download it again")
    for name, file in listed.items():
        # A name alone: nothing leads out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise ConversionError(
                f"{index}: puts {name} into {str(file)[:80]!r}; expected the name of a safetensors "
                "file beside the index"
            )
        if not (path / file).is_file():
            raise ConversionError(
                f"{path / file}: missing, while {INDEX} puts {name} into it; download it again"
            )
    return listed


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            raise ConversionError(
                f"{path}: its {size} bytes do not hold a header of {length}; the file is truncated "
                "or no safetensors, download it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
        header.pop("__metadata__", None)
        parts = [_parse(path, name, fields, 8 + length) for name, fields in header.items()]
    except ConversionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(
            f"{path}: its header cannot be read ({error!r}); download it again"
        ) from None
    place = 8 + length
    for _, entry, end in sorted(parts, key=lambda part: (part[1].offset, part[2])):
        if entry.offset != place:
            raise ConversionError(
                f"{path}: its header leaves a gap or an overlap at byte {place}; download it again"
            )
        place = end
    if place != size:
        raise ConversionError(
            f"{path}: {size} bytes, its header says {place}; the file is truncated or damaged, "
            "download it again"
        )
    return {name: entry for name, entry, _ in parts}


_BITS = {"BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def _parse(path: Path, name: str, fields: dict[str, Any], base: int) -> tuple[str, Entry, int]:
    dtype, shape = fields["dtype"], tuple(fields["shape"])
    begin, end = fields["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name} has a shape or a place that is no number")
    # Types that hold no weights still take their bytes: F32, I64, U8, F8_E5M2, ...
    found = re.fullmatch(r"(?:BF|F|I|U)(\d+)(?:_\w+)?", dtype)
    bits = _BITS.get(dtype) or (int(found[1]) if found else 0)
    if not bits or math.prod(shape) * bits != 8 * (end - begin):
        raise ConversionError(
            f"{path}: {name} is {dtype} {list(shape)}, which does not fill its {end - begin} "
            "bytes; download it again"
        )
    return name, Entry(path.name, dtype, shape, base + begin), base + end
