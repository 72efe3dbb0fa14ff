"""Writing a checkpoint from one process, chunk by chunk, with a few megabytes of memory.

The same folder as `writer.py` leaves, for tensors that are converted rather than trained: written
aside, digested on the way to the disk, and renamed into place when all of it is there. Chunks go
into files of a few gigabytes, so that many ranks read beside each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vlm.checkpoint import folder
from megatron_vlm.checkpoint.writer import write_companions

FILE_BYTES = 4 * 10**9
"""Size after which the next data file begins. Our choice."""

_LEAST_BESIDE = 1 << 20
"""Bytes below which another thread is not worth its while. Our choice."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a tensor."""


class StreamedCheckpoint:
    """A checkpoint being written; a context manager that leaves nothing unless it is committed.

    Whoever makes one has seen to it that nobody else writes into that folder meanwhile.
    """

    def __init__(self, root: Path, iteration: int, file_bytes: int = FILE_BYTES) -> None:
        """Make room for a checkpoint of `iteration` below `root`."""
        self._root, self._iteration, self._file_bytes = root, iteration, file_bytes
        self.path = folder.incomplete_path(root, iteration)
        self._made = [path for path in (root, *root.parents) if not path.exists()]
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._file: _DigestedFile | None = None
        self._committed = False

    def __enter__(self) -> StreamedCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        if self._committed:
            return
        if self._file is not None:
            self._file.discard()
        shutil.rmtree(self.path, ignore_errors=True)
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                # Somebody else has put something there meanwhile.
                return

    def write(self, name: str, shape: tuple[int, ...], box: Box, values: torch.Tensor) -> None:
        """Write a part of a tensor.

        Args:
            name: of the tensor.
            shape: of the whole.
            box: which part.
            values: the part, contiguous and with a storage of its own.

        Raises:
            OSError: the disk refuses.
        """
        offsets, sizes = box
        assert tuple(values.shape) == sizes and values.is_contiguous()
        if name not in self._tensors:
            # Given in full: the defaults depend on torch's default dtype.
            properties = TensorProperties(dtype=values.dtype)
            self._tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), [])
        entry = self._tensors[name]
        assert entry.properties.dtype == values.dtype
        file = self._current_file()
        start = file.place
        torch.save(values, file)  # type: ignore[arg-type]
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        index = MetadataIndex(name, torch.Size(offsets), len(entry.chunks))
        entry.chunks.append(chunk)
        self._storage[index] = _StorageInfo(file.name, start, file.place - start)

    def commit(self, state: dict[str, Any], files: dict[str, bytes]) -> Path:
        """Write what is left and rename the checkpoint into place.

        Args:
            state: what `state.json` says.
            files: other files by their path in the checkpoint.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: the disk refuses; nothing is left then either.
        """
        self._finish_file()
        meta = StorageMeta(checkpoint_id=None, save_id=None)
        index = Metadata(
            {**self._tensors}, None, self._storage, storage_meta=meta, version=CURRENT_DCP_VERSION
        )
        _write(self.path / ".metadata", pickle.dumps(index))
        write_companions(self.path, state, {})
        for name, content in files.items():
            (self.path / name).parent.mkdir(exist_ok=True)
            _write(self.path / name, content)
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            name = str(file.relative_to(self.path))
            if name not in self._files:
                size = file.stat().st_size
                self._files[name] = {"bytes": size, "sha256": folder.digest(file)}
        manifest = {"format_version": folder.FORMAT_VERSION, "files": self._files}
        folder.write_atomically(
            self.path / folder.MANIFEST, json.dumps(manifest, indent=1, sort_keys=True)
        )
        final = folder.commit(self._root, self._iteration)
        self._committed = True
        return final

    def _current_file(self) -> _DigestedFile:
        if self._file is not None and self._file.place >= self._file_bytes:
            self._finish_file()
        if self._file is None:
            self._file = _DigestedFile(self.path / f"__0_{len(self._files)}.distcp")
        return self._file

    def _finish_file(self) -> None:
        if self._file is not None:
            self._files[self._file.name] = self._file.finish()
            self._file = None


def boxes(shape: tuple[int, ...], itemsize: int, most_bytes: int) -> Iterator[Box]:
    """Cut a tensor into parts of at most `most_bytes`, if its last axis allows.

    Each part's elements follow each other in the tensor, and so do the parts.
    """
    axis, whole = 0, math.prod(shape) * itemsize
    # The first axis of which one step is small enough is the one that is cut.
    while axis + 1 < len(shape) and whole // shape[axis] > most_bytes:
        whole //= shape[axis]
        axis += 1
    step = max(1, most_bytes * shape[axis] // whole) if shape else 1
    leading = shape[:axis]
    for number in range(math.prod(leading)):
        place = _unravel(number, leading)
        for start in range(0, shape[axis], step):
            size = min(step, shape[axis] - start)
            rest = shape[axis + 1 :]
            yield (*place, start, *[0] * len(rest)), (*[1] * axis, size, *rest)


def _unravel(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(shape):
        number, index = divmod(number, size)
        place.append(index)
    return tuple(reversed(place))


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


class _DigestedFile(io.RawIOBase):
    """A file whose SHA-256 is computed from what passes by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = path.name
        self.place = 0
        self._stream = open(path, "wb", buffering=0)
        self._digest = hashlib.sha256()
        # Digesting takes as long as writing; both let other threads run meanwhile.
        self._beside = ThreadPoolExecutor(1)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, content: Any) -> int:
        """Write all of it."""
        view = memoryview(content).cast("B")
        beside = len(view) >= _LEAST_BESIDE
        digested = self._beside.submit(self._digest.update, view) if beside else None
        if digested is None:
            self._digest.update(view)
        try:
            left = view
            while left:
                left = left[self._stream.write(left) :]
        finally:
            if digested is not None:
                # What is written belongs to somebody else once this returns.
                digested.result()
        self.place += len(view)
        return len(view)

    def finish(self) -> dict[str, Any]:
        """Put it on the disk; its size and digest for the manifest."""
        os.fsync(self._stream.fileno())
        self.discard()
        return {"bytes": self.place, "sha256": self._digest.hexdigest()}

    def discard(self) -> None:
        """Close it as it is."""
        self._beside.shutdown()
        self._stream.close()
