"""Thousands of damaged files through build and fetch: each is named, and nothing else happens.

The build and the pass over the set run in a process of their own, whose memory and time are
watched: a crash of a decoder, a hang or a bomb that goes off would show there.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.samples import encoded, picture
from tests.data.videos import video

pytestmark = pytest.mark.unit

FORMATS = {
    "jpg": ("JPEG", {"quality": 80}),
    "progressive.jpg": ("JPEG", {"quality": 80, "progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "jp2": ("JPEG2000", {}),
    "avif": ("AVIF", {}),
}
_SPARED = 40
"""Entries whose lines are left alone: the oddest files are among them."""
MOST_MEMORY = 3 * 2**30
"""Bytes: several times what the largest picture takes, far below what a bomb would."""

_RUN = """
import json, resource, sys
from pathlib import Path
from megatron_vlm.cli.main import main
status = main(["data", "build", sys.argv[1], sys.argv[2], "--workers", "2"])
assert status == 0, status
from tests.data.damage_pass import read_all
found = read_all(Path(sys.argv[2]), Path(sys.argv[3]))
found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("FOUND " + json.dumps(found))
"""


def _mutated(content: bytes, kind: int, rng: np.random.Generator) -> bytes:
    data = bytearray(content)
    place = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for _ in range(int(rng.integers(1, 9))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        return bytes(data)
    if kind == 2:
        length = int(rng.integers(1, 200))
        data[place : place + length] = bytes(min(length, len(data) - place))
        return bytes(data)
    if kind == 3:
        # Headers hold sizes: four bytes of ones near the beginning.
        place = int(rng.integers(min(len(data), 64)))
        data[place : place + 4] = b"\xff" * 4
        return bytes(data)
    return bytes(rng.integers(0, 256, int(rng.integers(0, 300)), dtype=np.uint8))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says it is huge, with checksums in order."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _absurd_exif() -> list[bytes]:
    """JPEGs whose EXIF names orientations that there are not, or lies about its own size."""
    image, found = picture(40, 60), []
    for orientation in (0, 9, 255, 65535):
        exif = Image.Exif()
        exif[0x0112] = orientation
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", exif=exif)
        found.append(buffer.getvalue())
    plain = encoded(image, "JPEG")
    for content in (b"Exif\0\0" + b"\xff" * 50, b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"):
        found.append(
            plain[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + plain[2:]
        )
    return found


def _files(folder: Path, count: int) -> list[str]:
    """Write `count` files, most of them damaged, and return their names."""
    rng = np.random.default_rng(11)
    sound = {
        suffix: encoded(picture(48, 64, number), kind, **options)
        for number, (suffix, (kind, options)) in enumerate(FORMATS.items())
    }
    sound["mp4"] = video(frames=12)
    odd = [_bomb(60_000, 60_000), _bomb(1 << 30, 1), _bomb(8_000, 9_900), b"", b"\0" * 500]
    odd += _absurd_exif()
    names = []
    for number in range(count):
        suffixes = list(sound)
        suffix = suffixes[number % len(suffixes)]
        if number < len(odd):
            name, content = f"{number}.png", odd[number]
        elif number % 17 == 0:
            # Another extension than its content has.
            name, content = f"{number}.{suffixes[(number + 3) % 9]}", sound[suffix]
        elif number % 13 == 0:
            name, content = f"{number}.{suffix}", sound[suffix]
        else:
            name = f"{number}.{suffix}"
            content = _mutated(sound[suffix], number % 5, rng)
        (folder / name).write_bytes(content)
        names.append(name)
    return names


def _source(folder: Path, names: list[str]) -> Path:
    """One conversation a file; some lines are not UTF-8, no JSON, or of wrong types."""
    lines = []
    for number, name in enumerate(names):
        field = "videos" if name.endswith("mp4") else "images"
        mark = "<video>" if name.endswith("mp4") else "<image>"
        talk = [{"role": "user", "content": f"{mark}what?"}, {"role": "assistant", "content": "it"}]
        line = json.dumps({"id": name, field: [name], "messages": talk}).encode()
        if number < _SPARED:
            pass
        elif number % 29 == 1:
            line = line.replace(b"what", b"wh\xff\xfet")
        elif number % 31 == 1:
            line = line[: len(line) // 2]
        elif number % 37 == 1:
            line = line.replace(b'"it"', b"7")
        lines.append(line)
    path = folder / "source.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def _run(folder: Path, count: int, seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    names = _files(folder, count)
    source, out = _source(folder, names), folder / "set"
    command = [sys.executable, "-c", _RUN, str(source), str(out), str(folder / "odd")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    rejected = next(out.glob("*/rejected.jsonl")).read_text().splitlines()
    return json.loads(found.removeprefix("FOUND ")), [json.loads(line) for line in rejected]


@pytest.mark.parametrize(
    "count", [600, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_damaged_files_are_named_and_nothing_else(tmp_path: Path, count: int) -> None:
    found, rejected = _run(tmp_path, count, seconds=1500)
    # Nothing is lost: each entry is a sample or a rejection with a reason.
    assert found["samples"] + len(rejected) == count
    assert all(line["reason"] for line in rejected)
    assert count * 0.4 < len(rejected) < count * 0.97
    by_entry = {line["entry"]: line["reason"] for line in rejected}
    for bomb in range(2):
        assert "pixels" in by_entry[bomb]
    assert {2, 3, 4} <= set(by_entry)
    # Then the shards themselves were damaged, in the middle of pictures and texts.
    assert found["good"] == found["samples"]
    assert found["damaged"] > 0
    assert found["failed"] + found["read"] == found["samples"]
    assert 0 < found["failed"] <= found["damaged"]
    assert found["unnamed"] == 0
    assert found["peak"] < MOST_MEMORY


@pytest.mark.slow
def test_a_video_of_thirty_thousand_frames(tmp_path: Path) -> None:
    content = video(codec="mpeg4", frames=30_000, fps=30, size=(16, 16))
    (tmp_path / "long.mp4").write_bytes(content)
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    source = _source(tmp_path, ["long.mp4", "cut.mp4"])
    command = [
        sys.executable,
        "-c",
        _RUN,
        str(source),
        str(tmp_path / "set"),
        str(tmp_path / "odd"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("FOUND "))[6:])
    # A thousand seconds at a frame a second, 81,920 tokens at most: 640 frames of 128.
    assert found["samples"] == 1
    assert found["pictures"] == 640
    assert found["peak"] < MOST_MEMORY
