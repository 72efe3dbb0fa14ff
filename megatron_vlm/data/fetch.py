"""Reads single samples and pictures out of the shards, by offset.

Reads are positioned (`pread`), so any number of threads share one open file, and a rank touches
only the bytes it will compute on. A read that fails is tried again for a while, with the file
opened anew: network file systems go away and come back.
"""

from __future__ import annotations

import os
from functools import cached_property, lru_cache
from io import BytesIO, FileIO
from logging import getLogger
from threading import Event, Lock
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.tokenizer import KnotIds, Tokenizer
from megatron_vlm.errors import DataError

logger = getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class SampleReader:
    """Random access to a data set. Safe to share between threads."""

    def __init__(self, index: DatasetIndex, retry_seconds: float = 0.0) -> None:
        """Read from the shards of `index`; each is opened when first needed.

        Args:
            index: the data set.
            retry_seconds: how long a read that fails is tried again.
        """
        self.index = index
        self._retry_seconds = retry_seconds
        # Held by whoever reads, so that a file opened anew cannot take the number of one in use.
        self._files: dict[int, FileIO] = {}
        self._lock = Lock()
        self._closed = Event()
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        """Bytes read from shards so far."""
        return self._bytes_read

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
        """The encoded bytes of one of the sample's pictures, or of the video it is a frame of.

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

    @cached_property
    def knots(self) -> KnotIds:
        """The knots of the set's tokenizer.

        Raises:
            DataError: it has none.
        """
        return Tokenizer.load(self.index.tokenizer_path).knots

    def close(self) -> None:
        """Close the shards and stop trying again. Reading again opens them again."""
        self._closed.set()
        with self._lock:
            self._files.clear()

    def __enter__(self) -> SampleReader:
        """Itself; the shards are closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the shards."""
        self.close()

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.index.folder / self.index.shard_names[shard]
        pause, deadline = _FIRST_PAUSE, monotonic() + self._retry_seconds
        while True:
            try:
                content = self._read_once(shard, offset, size)
                break
            except OSError as error:
                self._forget(shard)
                left = deadline - monotonic()
                if left <= 0 or self._closed.is_set():
                    raise DataError(
                        f"{path}: cannot be read ({error.strerror or error}); restore the shard or "
                        "check the disk"
                    ) from error
                if pause == _FIRST_PAUSE:
                    logger.warning(
                        "%s: cannot be read (%s); trying again for %.0f s",
                        path,
                        error.strerror or error,
                        left,
                    )
                self._closed.wait(min(pause, left))
                pause = min(2 * pause, _LONGEST_PAUSE)
        with self._lock:
            self._bytes_read += size
        return content

    def _read_once(self, shard: int, offset: int, size: int) -> bytes:
        file = self._file(shard)
        parts, missing = [], size
        while missing:
            part = os.pread(file.fileno(), missing, offset + size - missing)
            if not part:
                end = os.fstat(file.fileno()).st_size
                raise OSError(
                    f"truncated: expected bytes {offset} to {offset + size}, but the file ends at "
                    f"{end}"
                )
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _file(self, shard: int) -> FileIO:
        with self._lock:
            if shard in self._files:
                return self._files[shard]
        # Without the lock: an open may hang for as long as its file system does.
        opened = FileIO(str(self.index.folder / self.index.shard_names[shard]))
        with self._lock:
            return self._files.setdefault(shard, opened)

    def _forget(self, shard: int) -> None:
        with self._lock:
            self._files.pop(shard, None)

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
