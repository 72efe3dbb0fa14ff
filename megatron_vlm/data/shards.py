"""Writes samples into plain WebDataset tars and collects the index columns on the way.

Shards are complete only under their final names, which they get all at once at the end; until then
an older data set in the same folder stays readable.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.format import (
    COLUMNS,
    sample_key_name,
    shard_name,
    sync_file,
    temporary_path,
)

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
    entry: Any
    """The original conversation."""
    tokens: NDArray[np.int32]
    """[2, n] ids and loss flags."""
    picture_positions: NDArray[np.int64]
    """[pictures] places of the placeholders."""
    pictures: list[EncodedPicture]


class ShardWriter:
    """Appends samples to numbered tars under temporary names."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """Write into `folder`; a shard is closed once it holds `shard_bytes` bytes."""
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._shards = 0
        self._columns = {name: array(_TYPECODES[dtype]) for name, dtype in COLUMNS.items()}
        self._columns["sample_picture_start"].append(0)

    def add(self, sample: EncodedSample) -> None:
        """Write one sample.

        Raises:
            OSError: the disk refuses.
        """
        if self._tar is None:
            path = temporary_path(self._folder / shard_name(self._shards))
            # USTAR has no extended headers, so a member's content follows its 512-byte header.
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
            self._shards += 1
        key = sample_key_name(sample.key)
        self._member(f"{key}.json", json.dumps(sample.entry).encode())
        buffer = io.BytesIO()
        np.save(buffer, sample.tokens, allow_pickle=False)
        offset, size = self._member(f"{key}.tokens.npy", buffer.getvalue())
        columns = self._columns
        columns["sample_key"].append(sample.key)
        columns["sample_shard"].append(self._shards - 1)
        columns["sample_offset"].append(offset)
        columns["sample_size"].append(size)
        columns["sample_text_tokens"].append(sample.tokens.shape[1])
        columns["sample_loss_tokens"].append(int(sample.tokens[1].sum()))
        columns["sample_picture_start"].append(
            columns["sample_picture_start"][-1] + len(sample.pictures)
        )
        for ordinal, picture in enumerate(sample.pictures):
            offset, size = self._member(f"{key}.{ordinal}.{picture.extension}", picture.encoded)
            columns["picture_shard"].append(self._shards - 1)
            columns["picture_offset"].append(offset)
            columns["picture_size"].append(size)
            columns["picture_height"].append(picture.height)
            columns["picture_width"].append(picture.width)
            columns["picture_position"].append(int(sample.picture_positions[ordinal]))
        if self._tar.offset >= self._shard_bytes:
            self._close_shard()

    def columns(self) -> dict[str, NDArray[Any]]:
        """The index columns of everything added so far."""
        return {name: np.array(self._columns[name], dtype) for name, dtype in COLUMNS.items()}

    def close(self) -> None:
        """Close the open shard; all still have temporary names."""
        self._close_shard()

    def publish(self) -> list[dict[str, Any]]:
        """Give every shard its final name.

        Returns:
            `{"name", "bytes"}` of each, in order, as `dataset.json` holds them.
        """
        shards = []
        for number in range(self._shards):
            path = self._folder / shard_name(number)
            os.replace(temporary_path(path), path)
            shards.append({"name": path.name, "bytes": path.stat().st_size})
        return shards

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

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            sync_file(temporary_path(self._folder / shard_name(self._shards - 1)))
