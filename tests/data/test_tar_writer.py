"""Tars written by hand are those of Python's tarfile, byte for byte."""

from __future__ import annotations

import hashlib
import io
import tarfile

import numpy as np
import pytest

from megatron_vlm.data import tar_writer
from megatron_vlm.data.tar_writer import TarWriter

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("count", [0, 1, 15, 40])
def test_bytes_and_offsets(count: int) -> None:
    rng = np.random.default_rng(count)
    sizes = [0, 1, 511, 512, 513, 70_000, *rng.integers(0, 3000, 40).tolist()][:count]
    names = ["a", "x" * 100, "000000001-12.tokens.npy", *(f"{n:09d}.0.jpg" for n in range(40))]
    expected, written = io.BytesIO(), io.BytesIO()
    writer = TarWriter(written)
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, size in zip(names, sizes, strict=False):
            info = tarfile.TarInfo(name)
            info.size = size
            content = rng.bytes(size)
            tar.addfile(info, io.BytesIO(content))
            offset = writer.add(name, content)
            assert written.getvalue()[offset : offset + size] == content
            assert writer.offset == tar.offset
    writer.finish()
    assert written.getvalue() == expected.getvalue()
    assert writer.offset == len(expected.getvalue())
    assert writer.sha256 == hashlib.sha256(expected.getvalue()).hexdigest()


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TarWriter(io.BytesIO())
    with pytest.raises(ValueError, match="too long for a tar"):
        writer.add("x" * 101, b"")
    assert tar_writer.MAX_MEMBER_BYTES == int("7" * 11, 8)
    monkeypatch.setattr(tar_writer, "MAX_MEMBER_BYTES", 9)
    with pytest.raises(ValueError, match="member a of 10 bytes"):
        writer.add("a", bytes(10))
    assert writer.offset == 0
