"""Where the numbers of a tensor lie inside what torch.save wrote.

torch.save writes a zip archive whose members are stored as they are: a small pickle that describes
the tensor, and its bytes in one piece. Knowing where that piece begins, a part of a tensor is read
without the rest. The archive is taken for a stranger's: everything in it is checked.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from typing import Any, ClassVar, NamedTuple

import torch

from megatron_vlm.errors import CheckpointError

_MOST_DESCRIPTION_BYTES = 1 << 16
"""A tensor's pickle takes some 200 bytes. Our choice."""
_LOCAL_HEADER = 30
"""Bytes of a zip member's own header before its name. Zip's specification, 4.3.7."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


class Located(NamedTuple):
    """A tensor's numbers in a file, in row-major order without gaps."""

    offset: int
    """First byte, from the file's beginning."""
    dtype: torch.dtype
    shape: tuple[int, ...]


def locate(descriptor: int, offset: int, length: int, name: str) -> Located:
    """Find the numbers of the tensor saved in `length` bytes at `offset` of an open file.

    Args:
        descriptor: the file's.
        offset: first byte of the archive.
        length: its bytes.
        name: what errors call it.

    Raises:
        CheckpointError: it is no tensor that torch.save wrote, or not stored plainly.
    """
    try:
        with zipfile.ZipFile(_Part(descriptor, offset, length)) as archive:
            return _locate(archive, offset, length)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}; the checkpoint is damaged, use another") from None
    except Exception as error:  # a damaged archive fails in any way it likes
        raise CheckpointError(
            f"{name}: cannot be read ({error}); the checkpoint is damaged, use another"
        ) from None


def _locate(archive: zipfile.ZipFile, offset: int, length: int) -> Located:
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    description, numbers = members["data.pkl"], members["data/0"]
    if description.file_size > _MOST_DESCRIPTION_BYTES:
        raise CheckpointError(f"its description has {description.file_size} bytes")
    if any(info.compress_type != zipfile.ZIP_STORED for info in (description, numbers)):
        raise CheckpointError("it is compressed")
    order = members.get("byteorder")
    if order is not None and (order.file_size > 8 or archive.read(order) != b"little"):
        raise CheckpointError("it is not in little-endian order")
    found = _Description(io.BytesIO(archive.read(description))).load()
    if not isinstance(found, _Tensor):
        raise CheckpointError("it holds no tensor")
    size = math.prod(found.shape) * found.dtype.itemsize
    if found.stride != _row_major(found.shape) and size:
        raise CheckpointError(f"its numbers have strides {found.stride}, not row-major ones")
    first = _first_byte(archive, numbers) + found.start * found.dtype.itemsize
    end = first + size
    if found.start < 0 or end > min(length, first + numbers.file_size):
        raise CheckpointError("its numbers are not all there")
    return Located(offset + first, found.dtype, found.shape)


def _first_byte(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a member's content begins: its own header tells, with padding of its own."""
    stream: Any = archive.fp
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise CheckpointError("its archive has no member where its directory says so")
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    return info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes


class _Tensor(NamedTuple):
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    numbers = (start, *shape, *stride)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError("its description is not that of a tensor")
    return _Tensor(storage, start, tuple(shape), tuple(stride))


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Description(pickle._Unpickler):
    """Reads what torch.save says about one tensor, and builds no tensor.

    It knows three names and no instruction that changes an object.
    """

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name that a tensor's description needs."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise CheckpointError(f"its pickle refers to {module}.{name}, which a tensor never needs")

    def persistent_load(self, pid: Any) -> torch.dtype:
        """The storage's dtype, which is all there is to know of it."""
        kind, dtype, key, *_ = pid
        if kind != "storage" or key != "0" or not isinstance(dtype, torch.dtype):
            raise CheckpointError("its description is not that of one tensor")
        return dtype

    dispatch: ClassVar[dict[int, Any]] = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()
        if code != pickle.BUILD[0]
    }


class _Part(io.RawIOBase):
    """Some bytes of a file as a file of their own, for reading."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._length = descriptor, offset, length
        self._place = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move as files do."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("before the beginning")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        """Where the next byte comes from."""
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        """Bytes from here on."""
        left = max(0, self._length - self._place)
        wanted = left if size is None or size < 0 else min(size, left)
        found = os.pread(self._descriptor, wanted, self._offset + self._place)
        self._place += len(found)
        return found
