"""Reads a data set's files whole and compares them with the digests that its build recorded.

A run looks at sizes and at the index alone, and finds damage inside a shard only where a sample can
no longer be decoded: other damage it would learn from. Here every byte is read, and none believed.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_vlm.data.build_progress import ReadProgress
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.format import DATASET_FILE, INDEX_FILE, is_build_name
from megatron_vlm.data.index import DatasetIndex, open_dataset, read_record
from megatron_vlm.data.ordered import Reserve, map_ordered, usable_cores
from megatron_vlm.data.pictures import FORMATS, check_picture
from megatron_vlm.errors import DataError

_PIECE = 1 << 20
"""Bytes that are read at a time."""
_LONGEST_END = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE
"""Zeros that may end a tar."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHANGED = "its bytes are not those that were built"


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not as it was built."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What a data set's files were found to be."""

    files: int
    """Files that were compared; `dataset.json`, which has their digests, is none of them."""
    bytes: int
    """Of all files, as they were built."""
    damaged: tuple[Damage, ...]


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A file as the build recorded it."""

    name: str
    sha256: str
    bytes: int | None
    """Null where only the digest was recorded."""


def verify_dataset(
    path: str | Path, *, workers: int | None = None, show_progress: bool = False
) -> Verified:
    """Read every file of a data set and compare it with its digest.

    Args:
        path: the folder.
        workers: files that are read at once; null: one per core that this process may use.
        show_progress: tell on standard error how far it is.

    Raises:
        DataError: there is no data set, it was built before digests were recorded, `dataset.json`
            is damaged, or all files are as they were built and still do not fit together.
    """
    given = Path(path)
    if not given.is_dir():
        raise DataError(
            f"{given}: no such folder; expected a data set written by `mvlm data build`"
        )
    if workers is not None and workers < 1:
        raise DataError(f"workers {workers}: expected at least 1")
    threads = workers or usable_cores()
    folder, files = _recorded(given)
    total = sum(_size(folder / file.name, file.bytes) for file in files)
    progress = ReadProgress(show_progress)
    compare = partial(_compare, folder, progress)
    results = map_ordered(compare, files, threads, 0)
    with closing(results), progress.start(0, total):
        found = [damage for damage in results if damage is not None]
    if not found:
        open_dataset(given)
    return Verified(len(files), total, tuple(_located(given, found, threads)))


def _recorded(given: Path) -> tuple[Path, list[_Recorded]]:
    """The folder of the files, and the files."""
    path = given / DATASET_FILE
    record = read_record(path)
    try:
        build = str(record["folder"])
        entries: list[Mapping[str, Any]] = [*record["shards"], record["index"], record["origins"]]
        entries += [record["tokenizer"], record.get("rejections", {})]
        if (template := record["chat"].get("template")) is not None:
            entries.append(template)
        digests = [entry.get("sha256") for entry in entries]
        if None in digests:
            raise DataError(
                f"{given}: was built before digests of all files were recorded, so it cannot be "
                "verified; build it again, which records them"
            )
        files = [
            _Recorded(str(entry["name"]), str(entry["sha256"]), _bytes(entry)) for entry in entries
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: field {error} is missing or of the wrong type; build the data set again"
        ) from error
    for file in files:
        plain = is_build_name(build) and Path(file.name).name == file.name
        if not plain or not _SHA256.fullmatch(file.sha256):
            raise DataError(
                f"{path}: folder {build!r}, file {file.name!r} or its sha256 {file.sha256!r} is "
                "none; build the data set again"
            )
    return given / build, files


def _bytes(entry: Mapping[str, Any]) -> int | None:
    return int(entry["bytes"]) if "bytes" in entry else None


def _size(path: Path, recorded: int | None) -> int:
    if recorded is not None:
        return recorded
    try:
        return path.stat().st_size
    except OSError:  # the comparison tells it
        return 0


def _compare(
    folder: Path, progress: ReadProgress, file: _Recorded, _: Reserve | None = None
) -> Damage | None:
    """Read a file; null if it is as it was built."""
    digest = hashlib.sha256()
    size = 0
    try:
        with (folder / file.name).open("rb", buffering=0) as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
                size += len(piece)
                progress.advance(len(piece))
    except FileNotFoundError:
        return Damage(file.name, "is missing")
    except OSError as error:
        return Damage(file.name, f"cannot be read after {size:,} bytes ({error.strerror})")
    if file.bytes is not None and size != file.bytes:
        return Damage(file.name, f"has {size:,} bytes; {file.bytes:,} were built")
    return None if digest.hexdigest() == file.sha256 else Damage(file.name, _CHANGED)


def _located(given: Path, found: Sequence[Damage], threads: int) -> list[Damage]:
    """The same, with the first sample of each shard that shows the damage, where one does."""
    changed = {damage.name for damage in found if damage.reason == _CHANGED}
    if not changed or INDEX_FILE in changed:
        return list(found)
    try:
        index = open_dataset(given)
    except DataError:  # another file of it is gone, and that was found too
        return list(found)
    with SampleReader(index) as reader:

        def locate(damage: Damage, _: Reserve) -> Damage:
            if damage.name not in changed or damage.name not in index.shard_names:
                return damage
            fault = _first_fault(reader, index.shard_names.index(damage.name))
            return Damage(damage.name, f"{_CHANGED}; {fault}")

        return list(map_ordered(locate, found, threads, 0))


def _first_fault(reader: SampleReader, shard: int) -> str:
    """What a shard that has changed can say of where."""
    index = reader.index
    columns = index.columns
    samples = np.flatnonzero(columns.sample_shard == shard)
    offsets = columns.sample_offset[samples].tolist()
    path = index.folder / index.shard_names[shard]
    try:
        with path.open("rb") as file:
            for begins, name, content in _members(file, index.shard_sizes[shard]):
                # A sample is its entry, its tokens, whose place is known, and its media.
                if name.endswith(".json"):
                    place = min(bisect_left(offsets, begins), len(offsets) - 1)
                else:
                    place = max(bisect_right(offsets, begins) - 1, 0)
                sample = int(samples[place])
                if reason := _fault(reader, sample, name, content):
                    return f"it first shows in {_named(index, sample)}, at {name}: {reason}"
    except _Broken as broken:
        place = max(bisect_right(offsets, broken.offset) - 1, 0)
        sample = int(samples[place])
        return f"it first shows in or after {_named(index, sample)}: {broken}"
    except OSError as error:
        return f"and it can no longer be read ({error.strerror})"
    return "which of its samples differ cannot be told: all of them can still be read"


class _Broken(Exception):
    """At an offset, a file is no tar any more."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"no member of a tar begins at byte {offset:,}")
        self.offset = offset


def _members(file: BinaryIO, size: int) -> Iterator[tuple[int, str, bytes]]:
    """Offset, name and content of each member.

    Raises:
        _Broken: a header or the padding before it is damaged.
        OSError: the file cannot be read.
    """
    block = tarfile.BLOCKSIZE
    begins = 0
    while True:
        header = file.read(block)
        if not any(header):
            if size - begins > _LONGEST_END:
                raise _Broken(begins)
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise _Broken(begins) from error
        begins += block
        padding = -member.size % block
        if not 0 <= member.size <= size - begins - padding:
            raise _Broken(begins - block)
        content = file.read(member.size)
        yield begins, member.name, content
        begins += member.size + padding
        if any(file.read(padding)):
            raise _Broken(begins)


def _fault(reader: SampleReader, sample: int, name: str, content: bytes) -> str | None:
    """Why a member cannot be what was built; null if nothing is seen. Videos are not looked at."""
    extension = name.rpartition(".")[2]
    try:
        if extension == "json":
            json.loads(content)
        elif extension == "npy":
            reader.read_tokens(sample)
        elif extension in FORMATS.values():
            check_picture(content)
    except DataError as error:
        return str(error).removeprefix(f"{reader.index.describe(sample)}: ")
    except (ValueError, RecursionError) as error:
        return f"not valid JSON ({error})"
    return None


def _named(index: DatasetIndex, sample: int) -> str:
    return index.describe(sample).removeprefix(f"{index.path}: ")
