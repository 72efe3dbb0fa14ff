"""Reading parts of tensors that lie in chunks: any range, any cut; damaged ones are refused."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.checkpoint.archive import locate
from megatron_vlm.checkpoint.stored import StoredTensors
from megatron_vlm.checkpoint.streamed import StreamedCheckpoint, boxes
from megatron_vlm.checkpoint.verify import verify_files, verify_index
from megatron_vlm.errors import CheckpointError

pytestmark = pytest.mark.unit

CUTS = [
    ((6, 2, 8, 3), (2, 1, 2, 1)),
    ((6, 2, 8, 3), (3, 2, 4, 1)),
    ((6, 8, 4), (3, 1, 2)),
    ((10, 6), (1, 3)),
    ((12, 5), (4, 1)),
    ((4, 4, 4), (2, 2, 2)),
    ((9,), (3,)),
    ((7, 3), (1, 1)),
]
"""Shapes, and how many parts each axis is cut into."""


def _write(root: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = {}
    with StreamedCheckpoint(root, 0, file_bytes=3000) as checkpoint:
        for number, (shape, cuts) in enumerate(CUTS):
            dtype = (torch.bfloat16, torch.float32, torch.float64)[number % 3]
            values = torch.randn(shape, generator=generator).to(dtype)
            whole[f"t{number}"] = values
            sizes = tuple(size // cut for size, cut in zip(shape, cuts, strict=True))
            for place in itertools.product(*map(range, cuts)):
                offsets = tuple(at * size for at, size in zip(place, sizes, strict=True))
                part = values
                for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    part = part.narrow(axis, offset, size)
                part = part.clone(memory_format=torch.contiguous_format)
                checkpoint.write(f"t{number}", shape, (offsets, sizes), part)
        checkpoint.commit({}, {"kept/notes.txt": b"text"})
    return whole


@pytest.mark.parametrize("shape", [(5,), (7, 3), (4, 2, 5, 3), (1, 1), (3, 2, 4)])
@pytest.mark.parametrize("most", [1, 8, 16, 64, 10**6])
def test_boxes_follow_each_other(shape: tuple[int, ...], most: int) -> None:
    order = torch.arange(torch.Size(shape).numel()).view(shape)
    found = []
    for offsets, sizes in boxes(shape, 4, most):
        part = order
        for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(axis, offset, size)
        assert part.numel() * 4 <= max(most, 4)
        found += part.flatten().tolist()
    assert found == list(range(order.numel()))


def test_any_range_of_any_cut(tmp_path: Path) -> None:
    whole = _write(tmp_path)
    path = tmp_path / "iter_0000000"
    verify_files(path)
    verify_index(path)
    draw = random.Random(1)
    with StoredTensors(path) as stored:
        assert stored.tensors.keys() == whole.keys()
        for name, values in whole.items():
            count = values.numel()
            for _ in range(100):
                start = draw.randrange(count)
                stop = draw.randrange(start + 1, count + 1)
                out = torch.full((stop - start,), float("nan"), dtype=values.dtype)
                stored.read(name, start, out)
                assert torch.equal(out, values.flatten()[start:stop]), (name, start, stop)


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "new" / "folder"
    with pytest.raises(OSError, match="disk"), StreamedCheckpoint(root, 0) as checkpoint:
        checkpoint.write("t", (4,), ((0,), (4,)), torch.ones(4))
        raise OSError("disk")
    assert not list(tmp_path.iterdir())


def _change_index(path: Path, change: Callable[[Any], None]) -> None:
    with open(path / ".metadata", "rb") as stream:
        index = pickle.load(stream)  # noqa: S301 - written by this test a moment ago
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def _drop_chunk(index: Any) -> None:
    index.state_dict_metadata["t4"].chunks.pop()


def _repeat_chunk(index: Any) -> None:
    chunks = index.state_dict_metadata["t4"].chunks
    chunks[-1] = chunks[0]


def _larger_shape(index: Any) -> None:
    index.state_dict_metadata["t4"].size = torch.Size((12, 6))


def _huge_shape(index: Any) -> None:
    index.state_dict_metadata["t4"].size = torch.Size((1 << 40, 5))


def _other_dtype(index: Any) -> None:
    index.state_dict_metadata["t4"].properties.dtype = torch.float64


def _shifted(index: Any) -> None:
    for place, info in index.storage_data.items():
        if place.fqn == "t4":
            info.offset += 1


def _exchanged(index: Any) -> None:
    """Another tensor's numbers."""
    places = {place.fqn: info for place, info in index.storage_data.items()}
    for place in index.storage_data:
        if place.fqn == "t4":
            index.storage_data[place] = places["t6"]


@pytest.mark.parametrize(
    "damage",
    [_drop_chunk, _repeat_chunk, _larger_shape, _huge_shape, _other_dtype, _shifted, _exchanged],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[Any], None]) -> None:
    _write(tmp_path)
    path = tmp_path / "iter_0000000"
    _change_index(path, damage)
    with pytest.raises(CheckpointError, match="t4.*damaged"), StoredTensors(path) as stored:
        out = torch.empty(60, dtype=stored.tensors["t4"].dtype)
        stored.read("t4", 0, out)


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def _archive(description: bytes, compress: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        archive.writestr("archive/data.pkl", description)
        archive.writestr("archive/data/0", bytes(40))
    return buffer.getvalue()


def _description(**changes: Any) -> bytes:
    """What torch.save writes about `[10]` float32, rebuilt with changes."""
    buffer = io.BytesIO()
    tensor = torch.zeros(10)
    torch.save(tensor, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        text = archive.read(name)
    for old, new in changes.items():
        assert old.encode() in text
        text = text.replace(old.encode(), new.encode())
    return text


ARCHIVES = {
    "a function": (_archive(pickle.dumps(_Attack())), "refers to posix.system"),
    "another rebuilding": (
        _archive(_description(_rebuild_tensor_v2="_rebuild_parameter")),
        "refers to torch._utils._rebuild_parameter",
    ),
    "another storage": (
        _archive(_description(FloatStorage="CharStorage_")),
        "refers to torch.CharStorage_",
    ),
    "no tensor": (_archive(pickle.dumps({"a": 1})), "holds no tensor"),
    "a changed object": (
        _archive(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN(Vname\nVvalue\ndb."),
        "cannot be read",
    ),
    "compressed": (_archive(_description(), zipfile.ZIP_DEFLATED), "is compressed"),
    "longer than its numbers": (
        _archive(_description().replace(b"K\x0a\x85", b"K\x7f\x85")),
        "not all there",
    ),
    "no archive": (b"\x00" * 300, "cannot be read"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_foreign_archive_is_not_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = ARCHIVES[name]
    file = tmp_path / "chunk"
    file.write_bytes(b"before" + content + b"after")
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with pytest.raises(CheckpointError, match=message):
            locate(descriptor, 6, len(content), "chunk")
    finally:
        os.close(descriptor)
    assert not (tmp_path / "owned").exists()


def test_a_plain_archive_is_found(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    values = torch.randn(3, 4)
    # A view: its numbers begin inside the storage.
    torch.save(values[1:], buffer)
    file = tmp_path / "chunk"
    file.write_bytes(b"x" * 77 + buffer.getvalue())
    descriptor = os.open(file, os.O_RDONLY)
    found = locate(descriptor, 77, len(buffer.getvalue()), "chunk")
    os.close(descriptor)
    assert (found.dtype, found.shape) == (torch.float32, (2, 4))
    part = file.read_bytes()[found.offset : found.offset + 32]
    assert part == values[1:].numpy().tobytes()
