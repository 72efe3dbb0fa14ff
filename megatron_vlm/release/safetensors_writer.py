"""Writing safetensors shards whose tensors come a few megabytes at a time.

Shapes and dtypes are known before the numbers: so is the header, which comes first in a file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_vlm.release.safetensors_reader import DTYPES, SINGLE

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a shard. The default of huggingface_hub."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """A file to be written."""

    file: str
    tensors: list[Tensor]


def plan_shards(tensors: list[Tensor], most_bytes: int) -> list[Shard]:
    """Spread tensors over files as huggingface_hub does, in the order given.

    A tensor larger than `most_bytes` gets a file of its own.
    """
    parts: list[list[Tensor]] = []
    current: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if tensor.bytes > most_bytes:
            parts.append([tensor])
            continue
        if size + tensor.bytes > most_bytes:
            parts.append(current)
            current, size = [], 0
        current.append(tensor)
        size += tensor.bytes
    if current:
        parts.append(current)
    if len(parts) == 1:
        return [Shard(SINGLE, parts[0])]
    stem, suffix = SINGLE.split(".")
    return [
        Shard(f"{stem}-{number:05d}-of-{len(parts):05d}.{suffix}", part)
        for number, part in enumerate(parts, start=1)
    ]


def write_shard(
    folder: Path, shard: Shard, values: Callable[[Tensor], Iterator[torch.Tensor]]
) -> None:
    """Write one file.

    Args:
        folder: where.
        shard: its name and tensors.
        values: gives a tensor's elements in row-major order, as many at a time as it likes, in
            its dtype.

    Raises:
        OSError: the disk refuses.
    """
    # Larger elements first, as the library does: each tensor then begins at a multiple of its
    # element, without which torch cannot look at the bytes in place.
    ordered = sorted(shard.tensors, key=lambda tensor: -tensor.dtype.itemsize)
    with open(folder / shard.file, "wb", buffering=0) as stream:
        _write_all(stream, _header(ordered))
        for tensor in ordered:
            left = tensor.bytes
            for part in values(tensor):
                assert part.dtype == tensor.dtype
                left -= part.nbytes
                _write_all(stream, part.view(-1).view(torch.uint8).numpy().data)
            assert left == 0
        os.fsync(stream.fileno())


def _header(tensors: list[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.bytes],
        }
        place += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_json(shards: list[Shard]) -> bytes:
    """The index of several shards, as transformers writes it."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "total_size": sum(tensor.bytes for tensor in tensors),
        },
        "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _write_all(stream: object, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]  # type: ignore[attr-defined]
