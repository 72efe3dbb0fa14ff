"""Reads single samples and pictures out of the shards, by offset.

Reads are positioned (`pread`), so any number of threads share one open file, and a rank touches
only the bytes it will compute on.
"""

from __future__ import annotations

import os
from functools import lru_cache
from io import BytesIO
from threading import Lock
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.pictures import decode_picture
from megatron_vlm.errors import DataError


class SampleReader:
    """Random access to a data set. Safe to share between threads."""

    def __init__(self, index: DatasetIndex) -> None:
        """Read from the shards of `index`; each is opened when first needed."""
        self.index = index
        self._descriptors: dict[int, int] = {}
        self._lock = Lock()
        self._bytes_read = 0
        self._pictures_decoded = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read from shards so far."""
        return self._bytes_read

    @property
    def pictures_decoded(self) -> int:
        """Pictures decoded so far."""
        return self._pictures_decoded

    def read_tokens(self, sample: int) -> NDArray[np.int32]:
        """The sample's text tokens, one placeholder per picture.

        Returns:
            int32 [2, text tokens], read-only: ids, and flags that are 1 where the token is a
            target.

        Raises:
            DataError: the shard is missing or truncated, or its content is not what the index
                says. Names the shard and the sample.
        """
        columns = self.index.columns
        content = self._read(
            int(columns.sample_shard[sample]),
            int(columns.sample_offset[sample]),
            int(columns.sample_size[sample]),
        )
        try:
            tokens = _parse_npy(content, int(columns.sample_text_tokens[sample]))
        except (ValueError, EOFError) as error:
            raise DataError(
                f"{self.index.describe(sample)}: tokens are damaged ({error}); restore the shard "
                "or build the data set again"
            ) from error
        if not self._fits(sample, tokens):
            raise DataError(
                f"{self.index.describe(sample)}: tokens are not what the index says; shard and "
                "index are of different data sets: build the data set again"
            )
        return tokens

    def read_encoded(self, sample: int, ordinal: int) -> bytes:
        """The encoded bytes of one of the sample's pictures, as they were in the source.

        Raises:
            DataError: the shard is missing or truncated.
            IndexError: the sample has fewer pictures.
        """
        picture = self.index.picture_range(sample)[ordinal]
        columns = self.index.columns
        return self._read(
            int(columns.picture_shard[picture]),
            int(columns.picture_offset[picture]),
            int(columns.picture_size[picture]),
        )

    def read_picture(self, sample: int, ordinal: int) -> NDArray[np.uint8]:
        """One of the sample's pictures as RGB, upright.

        Returns:
            uint8 [height, width, 3] of the size in the index.

        Raises:
            DataError: the shard is missing or truncated, or the picture cannot be decoded.
            IndexError: the sample has fewer pictures.
        """
        encoded = self.read_encoded(sample, ordinal)
        picture = self.index.picture_range(sample)[ordinal]
        try:
            image = decode_picture(encoded)
        except DataError as error:
            raise DataError(
                f"{self.index.describe(sample)}, picture {ordinal}: {error}; restore the shard or "
                "build the data set again"
            ) from error
        columns = self.index.columns
        expected = (int(columns.picture_height[picture]), int(columns.picture_width[picture]))
        if image.shape[:2] != expected:
            raise DataError(
                f"{self.index.describe(sample)}, picture {ordinal}: decodes to "
                f"{image.shape[0]}x{image.shape[1]}, but the index says "
                f"{expected[0]}x{expected[1]}; build the data set again"
            )
        with self._lock:
            self._pictures_decoded += 1
        return image

    def close(self) -> None:
        """Close the shards. Reading again opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> SampleReader:
        """Itself; the shards are closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the shards."""
        self.close()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.index.folder / self.index.shard_names[shard]
        try:
            descriptor = self._descriptor(shard)
            parts = []
            missing = size
            while missing:
                part = os.pread(descriptor, missing, offset + size - missing)
                if not part:
                    raise DataError(
                        f"{path}: truncated: expected bytes {offset} to {offset + size}, but the "
                        f"file ends at {os.fstat(descriptor).st_size}; restore the shard or build "
                        "the data set again"
                    )
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); restore the shard or check the disk"
            ) from error
        with self._lock:
            self._bytes_read += size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                path = self.index.folder / self.index.shard_names[shard]
                self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]

    def _fits(self, sample: int, tokens: NDArray[np.int32]) -> bool:
        columns = self.index.columns
        pictures = self.index.picture_range(sample)
        expected = (2, int(columns.sample_text_tokens[sample]))
        if tokens.dtype != np.int32 or tokens.shape != expected:
            return False
        ids, flags = tokens
        places = np.flatnonzero(ids == self.index.special_ids.image)
        return (
            ids.min() >= 0
            and ids.max() < self.index.vocab_size
            and int(np.count_nonzero(flags)) == int(columns.sample_loss_tokens[sample])
            and np.array_equal(places, columns.picture_position[pictures.start : pictures.stop])
            and not flags[places].any()
        )


def _parse_npy(content: bytes, length: int) -> NDArray[np.int32]:
    header = _npy_header(length)
    if content.startswith(header) and len(content) == len(header) + 8 * length:
        return np.frombuffer(content, np.dtype("<i4"), offset=len(header)).reshape(2, length)
    # Written by another program, or not what the index says.
    return np.load(BytesIO(content), allow_pickle=False)


@lru_cache(maxsize=4096)
def _npy_header(length: int) -> bytes:
    """What numpy writes before an int32 [2, length]; parsing it anew took most of a read."""
    buffer = BytesIO()
    shape = {"descr": "<i4", "fortran_order": False, "shape": (2, length)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()
