"""Small videos, made with PyAV, and their plain sequential decode."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from av.stream import Disposition


def drawn(number: int, height: int, width: int) -> np.ndarray:
    """A frame unlike all others: its number in gray, noise in a corner, which is bright."""
    image = np.full((height, width, 3), 40 + number * 7 % 160, np.uint8)
    rng = np.random.default_rng(number)
    image[: height // 3, : width // 3] = rng.integers(180, 256, 3)
    return image


def video(
    kind: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 60,
    fps: int = 10,
    size: tuple[int, int] = (48, 64),
    pts: Sequence[int] | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
    audio: bool = False,
    title: str = "",
    cover: bool = False,
) -> bytes:
    """A video; `pts` counts in 1/fps seconds; without frames, sound alone."""
    height, width = size
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=kind, options=options or {}) as container:
            container.metadata["title"] = title
            stream: Any = None
            if frames:
                stream = container.add_stream(codec, rate=fps)
                stream.width, stream.height = width, height
                stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
                stream.codec_context.gop_size = gop
                if cover:
                    stream.disposition = Disposition.attached_pic
            if audio:
                sound: Any = container.add_stream("aac", rate=8000)
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
                )
                silence.sample_rate, silence.pts = 8000, 0
                container.mux(sound.encode(silence))
                container.mux(sound.encode(None))
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(drawn(number, height, width), format="rgb24")
                frame.pts = number if pts is None else pts[number]
                frame.time_base = Fraction(1, fps)
                container.mux(stream.encode(frame))
            if frames:
                container.mux(stream.encode(None))
        return path.read_bytes()


def decoded(encoded: bytes) -> dict[int, np.ndarray]:
    """All frames by their times, as PyAV gives them from first to last."""
    with av.open(BytesIO(encoded)) as container:
        return {
            frame.pts: frame.to_ndarray(format="rgb24")
            for frame in container.decode(video=0)
            if frame.pts is not None
        }


def time_base(encoded: bytes) -> Fraction:
    with av.open(BytesIO(encoded)) as container:
        found = container.streams.video[0].time_base
        assert found is not None
        return found


def turned(encoded: bytes, quarters: int) -> bytes:
    """An MP4 whose header has it shown turned so many times clockwise (ISO/IEC 14496-12, 8.3.2)."""
    place = encoded.index(b"tkhd") + 4 + 40
    one = 0x10000
    a, b, c, d = [(one, 0, 0, one), (0, one, -one, 0), (-one, 0, 0, -one), (0, -one, one, 0)][
        quarters
    ]
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    return encoded[:place] + matrix + encoded[place + 36 :]
