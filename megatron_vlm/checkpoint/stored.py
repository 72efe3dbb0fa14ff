"""Reading parts of a checkpoint's tensors, whatever layout wrote them, and no more than asked for.

Tensors lie in chunks, one for each rank that owned a part. Any range of a tensor's elements, in
row-major order, is put together from the chunks that hold some of them, by reading just those
bytes: no chunk is ever held as a whole, and nothing is mapped into memory.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_vlm.checkpoint.archive import Located, locate
from megatron_vlm.checkpoint.verify import read_index
from megatron_vlm.errors import CheckpointError

_MOST_OPEN_FILES = 64


@dataclass
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    """First byte of what torch.save wrote."""
    length: int
    span: range
    """From its first element to its last, in the tensor."""
    located: Located | None = None


@dataclass
class Stored:
    """One tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk] = field(repr=False)
    proven: bool = False
    """Whether its chunks are known to hold every element once."""


class StoredTensors:
    """The tensors of a checkpoint by name; a context manager."""

    def __init__(self, path: Path) -> None:
        """Read the index.

        Raises:
            CheckpointError: it is damaged, or refers to what a checkpoint does not hold.
        """
        self.path = path
        self._files: OrderedDict[str, int] = OrderedDict()
        index = read_index(path)
        try:
            self.tensors = _tensors(index)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path / '.metadata'}: does not describe tensors ({error!r}); the checkpoint is "
                "damaged, use another"
            ) from None

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` `[count]`, of the tensor's dtype, with its elements from `start` on.

        Raises:
            CheckpointError: the checkpoint is damaged there.
        """
        tensor = self.tensors[name]
        if not tensor.proven:
            self._prove(name, tensor)
        stop = start + out.numel()
        for chunk in tensor.chunks:
            # Most chunks have nothing of a part, and this is quickly seen.
            if chunk.span.start < stop and start < chunk.span.stop:
                for piece in _pieces(tensor.shape, chunk, start, stop):
                    self._copy(name, chunk, piece, out)

    def _copy(self, name: str, chunk: _Chunk, piece: _Piece, out: torch.Tensor) -> None:
        descriptor = self._open(chunk.file)
        located = chunk.located
        if located is None:
            located = chunk.located = self._locate(name, chunk, descriptor)
        if piece.number == 1:
            part = out[piece.out : piece.out + piece.length]
        else:
            part = torch.empty(piece.number * piece.length, dtype=out.dtype)
        place = located.offset + piece.local * out.itemsize
        read_into(descriptor, place, part, f"{self.path / chunk.file}")
        if piece.number > 1:
            rows = out.as_strided((piece.number, piece.length), (piece.stride, 1), piece.out)
            rows.copy_(part.view(piece.number, piece.length))

    def _locate(self, name: str, chunk: _Chunk, descriptor: int) -> Located:
        label = f"{self.path / chunk.file} ({name})"
        found = locate(descriptor, chunk.start, chunk.length, label)
        tensor = self.tensors[name]
        if (found.dtype, found.shape) != (tensor.dtype, chunk.sizes):
            raise CheckpointError(
                f"{label}: holds {found.dtype} {list(found.shape)}, the index says {tensor.dtype} "
                f"{list(chunk.sizes)}; the checkpoint is damaged, use another"
            )
        return found

    def _open(self, file: str) -> int:
        if file in self._files:
            self._files.move_to_end(file)
            return self._files[file]
        if len(self._files) >= _MOST_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[file] = os.open(self.path / file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{self.path / file}: cannot be opened ({error.strerror}); the checkpoint is "
                "damaged, use another"
            ) from None
        return self._files[file]

    def _prove(self, name: str, tensor: Stored) -> None:
        """That the chunks hold every element of a tensor once: they fill a grid of their edges."""
        axes = range(len(tensor.shape))
        edges = [
            sorted({e for c in tensor.chunks for e in (c.offsets[i], c.offsets[i] + c.sizes[i])})
            for i in axes
        ]
        # A grid no larger than the chunks could fill: a damaged index may ask for any size.
        cells = [len(each) - 1 for each in edges]
        whole = all(
            each[0] == 0 and each[-1] == size
            for each, size in zip(edges, tensor.shape, strict=True)
        )
        if whole and math.prod(cells) <= 64 * len(tensor.chunks) ** 2:
            filled = np.zeros(cells, dtype=np.int32)
            for chunk in tensor.chunks:
                filled[
                    tuple(
                        slice(
                            edges[i].index(chunk.offsets[i]),
                            edges[i].index(chunk.offsets[i] + chunk.sizes[i]),
                        )
                        for i in axes
                    )
                ] += 1
            tensor.proven = bool((filled == 1).all())
        if not tensor.proven:
            raise CheckpointError(
                f"{self.path}: the chunks of {name} do not hold each of its elements once; the "
                "checkpoint is damaged, use another"
            )


def read_into(descriptor: int, offset: int, out: torch.Tensor, name: str) -> None:
    """Fill a contiguous tensor with the bytes at `offset` of an open file.

    Raises:
        CheckpointError: the file ends before, or cannot be read; `name` is what it is called.
    """
    view = out.view(-1).view(torch.uint8).numpy().data
    while view:
        try:
            found = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise CheckpointError(
                f"{name}: cannot be read at byte {offset} ({error.strerror}); use another copy"
            ) from None
        if not found:
            raise CheckpointError(f"{name}: ends at byte {offset}, where more was expected")
        view, offset = view[found:], offset + found


class _Piece(NamedTuple):
    """Runs of equal length and distance that follow each other in a chunk."""

    number: int
    length: int
    """Elements of each."""
    stride: int
    """Elements from one to the next, in the tensor."""
    local: int
    """First element in the chunk."""
    out: int
    """First element in what is asked for."""


def _pieces(shape: tuple[int, ...], chunk: _Chunk, start: int, stop: int) -> Iterator[_Piece]:
    """What a chunk has of the elements from `start` to below `stop` of a tensor.

    From its last axis that is cut on, a chunk's elements follow each other in the tensor too: a
    run. Runs lie at equal distances as long as no axis before is cut.
    """
    if not shape:
        yield from _runs(0, 1, 1, 1, 0, start, stop)
        return
    cut = [i for i, size in enumerate(chunk.sizes) if size != shape[i]]
    last = cut[-1] if cut else 0
    before = cut[-2] + 1 if len(cut) > 1 else 0
    width = math.prod(shape[last + 1 :])
    length, stride = chunk.sizes[last] * width, math.prod(shape[last:])
    count = math.prod(chunk.sizes[before:last])
    local = 0
    starts = zip(chunk.offsets[:before], chunk.sizes[:before], strict=True)
    outer = [range(start_at, start_at + size) for start_at, size in starts]
    for place in itertools.product(*outer):
        index = (*place, *chunk.offsets[before:])
        first = _flat(shape, index)
        yield from _runs(first, count, length, stride, local, start, stop)
        local += count * length


def _flat(shape: tuple[int, ...], index: tuple[int, ...]) -> int:
    """Number of an element in row-major order."""
    return sum(at * math.prod(shape[axis + 1 :]) for axis, at in enumerate(index))


def _runs(
    first: int, count: int, length: int, stride: int, local: int, start: int, stop: int
) -> Iterator[_Piece]:
    """Which of `count` runs, the first at element `first`, fall between `start` and `stop`."""
    number = max(0, (start - first) // stride)
    while number < count:
        begin = first + number * stride
        if begin >= stop:
            return
        end = begin + length
        if begin >= start and end <= stop:
            # As many whole runs as there are before `stop`.
            whole = min(count - number, 1 + (stop - end) // stride)
            yield _Piece(whole, length, stride, local + number * length, begin - start)
            number += whole
            continue
        low, high = max(begin, start), min(end, stop)
        if low < high:
            inside = local + number * length + low - begin
            yield _Piece(1, high - low, stride, inside, low - start)
        number += 1


def _tensors(index: Any) -> dict[str, Stored]:
    places = {(place.fqn, tuple(place.offset)): info for place, info in index.storage_data.items()}
    found = {}
    for name, entry in index.state_dict_metadata.items():
        shape = tuple(map(int, entry.size))
        chunks = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
            info = places[name, offsets]
            if len(offsets) != len(shape) or len(sizes) != len(shape):
                raise ValueError(f"a chunk of {name} has another number of axes")
            if info.transform_descriptors:
                raise ValueError(f"a chunk of {name} is transformed")
            ends = tuple(offset + size - 1 for offset, size in zip(offsets, sizes, strict=True))
            span = range(_flat(shape, offsets), _flat(shape, ends) + 1)
            place, length = int(info.offset), int(info.length)
            chunks.append(_Chunk(offsets, sizes, info.relative_path, place, length, span))
        dtype = entry.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} has no dtype")
        found[name] = Stored(shape, dtype, chunks)
    return found
