"""Writes samples into plain WebDataset tars, and beside each tar what the index needs of it.

The tar's bytes go through a file of our own, so that a build that fails (a full disk above all)
can drop what it has begun without writing another byte. Nothing is held longer than its shard.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.encode import EncodedEntry, EncodedSample, Rejection
from megatron_vlm.data.format import (
    COLUMNS,
    STILL,
    column_length,
    member_key,
    shard_name,
    sync,
    write_atomic,
)
from megatron_vlm.data.tar_writer import TarWriter

_TYPECODES = {"int32": "i", "int64": "q"}
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A complete shard, and where the source goes on after it."""

    name: str
    """File name of the tar."""
    bytes: int
    """Of the tar."""
    sha256: str
    """Of the tar, as it was written."""
    samples: int
    pictures: int
    """Pictures and frames."""
    frames: int
    """Frames of videos among them."""
    text_tokens: int
    loss_tokens: int
    rejected: int
    """Samples and entries left out since the shard before it."""
    columns_sha256: str
    """Of the file beside it that holds its columns."""
    rejected_sha256: str
    """Of the file beside it that lists what was left out."""
    next_entry: int
    """The first entry of the source that is not in this shard or one before it."""


class ShardFiles:
    """The files of one shard while a set is built."""

    def __init__(self, folder: Path, number: int) -> None:
        """Name them; nothing is opened."""
        self.tar = folder / shard_name(number)
        self.columns = self.tar.with_suffix(".columns")
        """The shard's part of each column, one after another, then two digests a sample: of what
        a model is shown, and of the entry."""
        self.rejected = self.tar.with_suffix(".rejected")
        self.record = self.tar.with_suffix(".json")
        """Written last: a shard with a record is complete."""

    def paths(self) -> set[Path]:
        """All of them."""
        return {self.tar, self.columns, self.rejected, self.record}

    def read_record(self) -> ShardRecord | None:
        """The record, if the shard is complete and its files are as they were written."""
        try:
            record = ShardRecord(**json.loads(self.record.read_bytes()))
            whole = (
                record.name == self.tar.name
                and self.tar.stat().st_size == record.bytes
                and _file_sha256(self.columns) == record.columns_sha256
                and _file_sha256(self.rejected) == record.rejected_sha256
            )
        except (OSError, ValueError, TypeError):
            return None
        return record if whole else None

    def read_column(self, name: str, record: ShardRecord) -> NDArray[Any]:
        """The shard's part of a column; of `sample_picture_start`, counted from the shard's own
        first picture."""
        offset = 0
        for column, dtype in COLUMNS.items():
            length = column_length(column, record.samples, record.pictures)
            if column == name:
                return np.fromfile(self.columns, dtype, length, offset=offset)
            offset += length * np.dtype(dtype).itemsize
        raise KeyError(name)

    def read_digests(self, record: ShardRecord) -> tuple[bytes, bytes]:
        """Digests of what a model is shown, and of the entries, each of all samples in order."""
        size = record.samples * _DIGEST_BYTES
        with self.columns.open("rb") as file:
            file.seek(-2 * size, io.SEEK_END)
            return file.read(size), file.read(size)


class ShardWriter:
    """Appends the samples of entries to numbered tars, and lists what is left out."""

    def __init__(
        self,
        folder: Path,
        shard_bytes: int,
        origins: Sequence[str],
        complete: Sequence[ShardRecord] = (),
    ) -> None:
        """Go on after the shards that are complete.

        Args:
            folder: to write into.
            shard_bytes: a shard is closed once it holds so many.
            origins: names of the source's files, for the list of what is left out.
            complete: the shards that `folder` holds.
        """
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._origins = origins
        self._complete = list(complete)
        self._bytes = sum(record.bytes for record in complete)
        self._next_entry = complete[-1].next_entry if complete else 0
        self._file: BinaryIO | None = None
        self._tar: TarWriter | None = None
        self._start()

    @property
    def bytes_written(self) -> int:
        """Bytes of all tars so far."""
        return self._bytes + (self._tar.offset if self._tar else 0)

    def add(self, entry: EncodedEntry) -> None:
        """Write what came of an entry, which is the next one.

        Raises:
            OSError: the disk refuses.
        """
        for rejection in entry.rejections:
            self._reject(rejection)
        self._next_entry = entry.number + 1
        if not entry.samples:
            return
        tar = self._tar or self._open_tar()
        places: list[tuple[int, int]] = []
        for sample in entry.samples:
            self._add_sample(entry, sample, places)
        if tar.offset >= self._shard_bytes:
            self._close_shard()

    def finish(self) -> tuple[list[ShardRecord], Path]:
        """Complete the last shard.

        Returns:
            The records of all shards, and the file that lists what was left out after the last.

        Raises:
            OSError: the disk refuses.
        """
        if self._tar is not None:
            self._close_shard()
        self._rejections.close()
        return self._complete, self._files.rejected

    def abort(self) -> None:
        """Close the open files as they are; the shard that they are of is not complete."""
        for file in (self._file, self._rejections):
            # Closing writes what is still buffered, which the disk may refuse once more.
            with suppress(OSError):
                if file is not None:
                    file.close()
        self._file = self._tar = None

    def _start(self) -> None:
        """Begin the next shard; its tar is made when there is a sample for it."""
        self._files = ShardFiles(self._folder, len(self._complete))
        self._rejections: BinaryIO = self._files.rejected.open("wb")
        self._rejected = 0
        self._columns = {name: array(_TYPECODES[dtype]) for name, dtype in COLUMNS.items()}
        self._columns["sample_picture_start"].append(0)
        self._content = bytearray()
        self._entries = bytearray()

    def _reject(self, rejection: Rejection) -> None:
        line = {**rejection._asdict(), "origin": self._origins[rejection.origin]}
        self._rejections.write(json.dumps(line).encode() + b"\n")
        self._rejected += 1

    def _add_sample(
        self, entry: EncodedEntry, sample: EncodedSample, places: list[tuple[int, int]]
    ) -> None:
        """Write a sample; `places` gets offset and size of the media that are stored with it."""
        self._content += sample.digest
        self._entries += hashlib.sha256(sample.entry).digest()
        shard = len(self._complete)
        key = member_key(entry.number, sample.draft)
        self._member(f"{key}.json", sample.entry)
        offset, size = self._member(f"{key}.tokens.npy", _npy(sample.tokens))
        for medium in entry.media[len(places) :]:
            if medium.draft != sample.draft:
                break
            name = f"{key}.{medium.ordinal}.{medium.extension}"
            places.append(self._member(name, medium.content))
        before = self._columns["sample_picture_start"][-1]
        self._append(
            "sample",
            entry=entry.number,
            draft=sample.draft,
            origin=entry.origin,
            shard=shard,
            offset=offset,
            size=size,
            text_tokens=sample.tokens.shape[1],
            loss_tokens=int(sample.tokens[1].sum()),
            picture_start=before + len(sample.pictures),
        )
        for picture in sample.pictures:
            offset, size = places[picture.medium]
            self._append(
                "picture",
                shard=shard,
                offset=offset,
                size=size,
                height=picture.height,
                width=picture.width,
                position=picture.position,
                max_tokens=picture.max_tokens,
                pts=picture.pts,
            )

    def _append(self, table: str, **values: int) -> None:
        for name, value in values.items():
            self._columns[f"{table}_{name}"].append(value)

    def _member(self, name: str, content: bytes) -> tuple[int, int]:
        """Append a member; returns offset and size of its content in bytes."""
        assert self._tar is not None
        return self._tar.add(name, content), len(content)

    def _open_tar(self) -> TarWriter:
        self._file = self._files.tar.open("wb")
        self._tar = TarWriter(self._file)
        return self._tar

    def _close_shard(self) -> None:
        """Complete the shard: everything is on the disk before its record says so."""
        assert self._tar is not None and self._file is not None
        self._tar.finish()
        tar_sha256 = self._tar.sha256
        self._file.close()
        self._file = self._tar = None
        self._rejections.close()
        columns = self._columns
        with self._files.columns.open("wb") as file:
            for name in COLUMNS:
                file.write(columns[name])
            file.write(self._content)
            file.write(self._entries)
        for path in (self._files.tar, self._files.columns, self._files.rejected):
            sync(path)
        record = ShardRecord(
            name=self._files.tar.name,
            bytes=self._files.tar.stat().st_size,
            sha256=tar_sha256,
            samples=len(columns["sample_entry"]),
            pictures=len(columns["picture_size"]),
            frames=sum(pts != STILL for pts in columns["picture_pts"]),
            text_tokens=sum(columns["sample_text_tokens"]),
            loss_tokens=sum(columns["sample_loss_tokens"]),
            rejected=self._rejected,
            columns_sha256=_file_sha256(self._files.columns),
            rejected_sha256=_file_sha256(self._files.rejected),
            next_entry=self._next_entry,
        )
        write_atomic(self._files.record, json.dumps(asdict(record)).encode())
        self._bytes += record.bytes
        self._complete.append(record)
        self._start()


def _npy(tokens: NDArray[np.int32]) -> bytes:
    """What numpy.save writes of int32 [2, n]."""
    return _npy_header(tokens.shape[1]) + tokens.astype("<i4", order="C", copy=False).tobytes()


@lru_cache(maxsize=4096)
def _npy_header(length: int) -> bytes:
    # Made anew for each sample, it took a third of the time of writing.
    buffer = io.BytesIO()
    shape = {"descr": "<i4", "fortran_order": False, "shape": (2, length)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
