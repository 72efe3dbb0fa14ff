"""Writes samples into plain WebDataset tars and collects the index columns on the way.

The tar's bytes go through a file of our own, so that a build that fails (a full disk above all)
can drop what it has begun without writing another byte.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.format import COLUMNS, STILL, member_key, shard_name, sync

_TYPECODES = {"int32": "i", "int64": "q"}


@dataclass(frozen=True, slots=True)
class EncodedPicture:
    """A checked picture as it goes into a shard."""

    encoded: bytes
    extension: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A checked sample as it goes into a shard."""

    key: int
    """Place in the source list."""
    entry: bytes
    """The original conversation as JSON."""
    tokens: NDArray[np.int32]
    """[2, n] ids and loss flags."""
    picture_positions: NDArray[np.int64]
    """[pictures] places of the placeholders."""
    pictures: list[EncodedPicture]
    digest: bytes
    """Its `sample_digest`."""


def sample_digest(tokens: NDArray[np.int32], pictures: Sequence[EncodedPicture]) -> bytes:
    """SHA-256 of what a model is shown: ids, loss flags [2, n], and the pictures as encoded."""
    parts = [tokens.astype("<i4", order="C").tobytes(), *(p.encoded for p in pictures)]
    # Of digests, since a plain concatenation would not tell where one part ends.
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


class ShardWriter:
    """Appends samples to numbered tars."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """Write into `folder`; a shard is closed once it holds `shard_bytes` bytes."""
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._shards: list[dict[str, Any]] = []
        self._columns = {name: array(_TYPECODES[dtype]) for name, dtype in COLUMNS.items()}
        self._columns["sample_picture_start"].append(0)
        self._content = hashlib.sha256()
        self._entries = hashlib.sha256()

    def add(self, sample: EncodedSample) -> None:
        """Write one sample.

        Raises:
            OSError: the disk refuses.
        """
        tar = self._tar or self._open_shard()
        self._content.update(sample.digest)
        self._entries.update(hashlib.sha256(sample.entry).digest())
        shard = len(self._shards) - 1
        key = member_key(sample.key, 0)
        self._member(f"{key}.json", sample.entry)
        buffer = io.BytesIO()
        np.save(buffer, sample.tokens, allow_pickle=False)
        offset, size = self._member(f"{key}.tokens.npy", buffer.getvalue())
        columns = self._columns
        columns["sample_entry"].append(sample.key)
        columns["sample_draft"].append(0)
        columns["sample_origin"].append(0)
        columns["sample_shard"].append(shard)
        columns["sample_offset"].append(offset)
        columns["sample_size"].append(size)
        columns["sample_text_tokens"].append(sample.tokens.shape[1])
        columns["sample_loss_tokens"].append(int(sample.tokens[1].sum()))
        columns["sample_picture_start"].append(
            columns["sample_picture_start"][-1] + len(sample.pictures)
        )
        for ordinal, picture in enumerate(sample.pictures):
            offset, size = self._member(f"{key}.{ordinal}.{picture.extension}", picture.encoded)
            columns["picture_shard"].append(shard)
            columns["picture_offset"].append(offset)
            columns["picture_size"].append(size)
            columns["picture_height"].append(picture.height)
            columns["picture_width"].append(picture.width)
            columns["picture_position"].append(int(sample.picture_positions[ordinal]))
            columns["picture_max_tokens"].append(0)
            columns["picture_pts"].append(STILL)
        if tar.offset >= self._shard_bytes:
            self._close_shard()

    def columns(self) -> dict[str, NDArray[Any]]:
        """The index columns of everything added so far."""
        return {name: np.array(self._columns[name], dtype) for name, dtype in COLUMNS.items()}

    def content_sha256(self) -> str:
        """Hexadecimal SHA-256 of every sample's `digest`, in order: alike for any shard size."""
        return self._content.hexdigest()

    def entries_sha256(self) -> str:
        """Hexadecimal SHA-256 of the original conversations, in order."""
        return self._entries.hexdigest()

    def finish(self) -> list[dict[str, Any]]:
        """Complete the last shard.

        Returns:
            `{"name", "bytes"}` of each, in order, as `dataset.json` holds them.

        Raises:
            OSError: the disk refuses.
        """
        self._close_shard()
        return self._shards

    def abort(self) -> None:
        """Close the open shard as it is, if there is one; it is no whole tar."""
        file, self._file, self._tar = self._file, None, None
        if file is not None:
            # Closing writes what is still buffered, which the disk may refuse once more.
            with suppress(OSError):
                file.close()

    def _member(self, name: str, content: bytes) -> tuple[int, int]:
        """Append a member; returns offset and size of its content in bytes."""
        assert self._tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(content)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(content))
        # tarfile remembers every member for its own listing; a long build would fill memory.
        self._tar.members.clear()  # type: ignore[attr-defined]
        return offset, len(content)

    def _open_shard(self) -> tarfile.TarFile:
        path = self._folder / shard_name(len(self._shards))
        self._file = path.open("wb")
        # USTAR has no extended headers, so a member's content follows its 512-byte header.
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._shards.append({"name": path.name})
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._file = self._tar = None
        path = self._folder / self._shards[-1]["name"]
        sync(path)
        self._shards[-1]["bytes"] = path.stat().st_size
