"""Videos as frames: which ones a model sees, and their pixels.

Sampling follows Seed1.5-VL (arXiv 2505.07062): frames at a rate, each after its time as text, at
the highest of a few levels of tokens a frame that the budget allows.
Decoding streams: of a video of any length a few frames are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.containers import Reader, faults
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

LEVELS = (640, 512, 384, 256, 160, 128)
"""Most language tokens that one frame may have, highest first. Seed1.5-VL."""

_SEEK_MARGIN = Fraction(1, 2)
"""Seconds by which a keyframe must come before the frame that is looked for: indexes hold times of
decoding, which come before those of display."""


@dataclass(frozen=True, slots=True)
class VideoSample:
    """The frames of a video that a model sees."""

    pts: tuple[int, ...]
    """Their times in the stream's own time base, ascending: what `decode_frames` takes."""
    seconds: tuple[float, ...]
    """Their times after the first frame."""
    height: int
    """In pixels, upright."""
    width: int
    """Likewise."""
    level: int
    """Most language tokens that each frame may have: a cap on its grid, which may be smaller."""


def timestamp(seconds: float) -> str:
    """The text that comes before a frame, as Seed1.5-VL's: `[1.5 second]`."""
    return f"[{seconds:.1f} second]"


def sample_video(
    encoded: bytes, fps: float, max_tokens: int, levels: Sequence[int] = LEVELS
) -> VideoSample:
    """Choose the frames shown at 0, 1/fps, 2/fps, ... seconds after the first, and their level.

    A frame shown at several of these times is taken once. The level is the largest of which the
    frames need at most `max_tokens` together; where even the smallest needs more, frames are left
    out evenly. The whole video is decoded, so that what is chosen can be decoded again.

    Args:
        encoded: the file.
        fps: frames a second wanted. Seed1.5-VL: 1, for fine motion 2, for counting 5.
        max_tokens: language tokens of all frames together. Seed1.5-VL: 81,920.
        levels: tokens of a frame to choose from.

    Raises:
        DataError: it has no video, is damaged, too long or too large, or its times run backwards;
            or an argument is out of range.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise DataError(f"fps {fps}: expected a number above 0")
    if not levels or min(levels) < 1:
        raise DataError(f"levels {list(levels)}: expected numbers of tokens of at least 1")
    if max_tokens < min(levels):
        raise DataError(
            f"max_tokens {max_tokens}: one frame needs at least {min(levels)}; raise it"
        )
    # The decimal that was written: 0.1 means a frame every 10 seconds, to the tick.
    rate = Fraction(str(float(fps)))
    with faults(), Reader(encoded) as reader:
        size, chosen = _choose(reader, rate)
    level = next(
        (one for one in sorted(levels, reverse=True) if one * len(chosen) <= max_tokens), 0
    )
    if not level:
        level = min(levels)
        chosen = _evenly(chosen, max_tokens // level)
    return VideoSample(
        pts=tuple(pts for pts, _ in chosen),
        seconds=tuple(float(seconds) for _, seconds in chosen),
        height=size[0],
        width=size[1],
        level=level,
    )


def decode_frames(encoded: bytes, pts: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Decode frames that `sample_video` chose, in order.

    What lies between them is skipped from keyframe to keyframe where the file has an index of them.

    Args:
        encoded: the file.
        pts: times of the frames in the stream's time base, ascending.

    Yields:
        uint8 [height, width, 3], RGB, upright.

    Raises:
        DataError: it is damaged, or has no frame of such a time; from the iterator, once it comes
            to that frame.
        ValueError: the times do not ascend.
    """
    if any(after <= before for before, after in zip(pts, pts[1:], strict=False)):
        raise ValueError("pts must ascend")
    return _decode_frames(encoded, pts)


def _decode_frames(encoded: bytes, pts: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    found = 0
    try:
        with faults(), Reader(encoded) as reader:
            for frame in _visit(reader, pts, reader.keyframes()):
                if frame is None:
                    break
                yield _upright(frame)
                found += 1
    except DataError:
        pass
    if found == len(pts):
        return
    # After a jump, decoders may leave out frames that need what was jumped over, or stumble.
    with faults(), Reader(encoded) as reader:
        for target, frame in zip(pts[found:], _visit(reader, pts[found:], []), strict=True):
            if frame is None:
                raise DataError(
                    f"video has no frame at {target} (x {reader.time_base} seconds); it is not the "
                    "video that was sampled: build the data set again"
                )
            yield _upright(frame)


def _visit(
    reader: Reader, pts: Sequence[int], keyframes: Sequence[int]
) -> Iterator[VideoFrame | None]:
    """The frame of each time, in order; null, and the end, at the first that is not there."""
    margin = math.ceil(_SEEK_MARGIN / reader.time_base)
    frames = reader.frames()
    position: int | None = None
    for target in pts:
        jump = max((one for one in keyframes if one <= target - margin), default=None)
        ahead = keyframes[0] if position is None and keyframes else position
        if jump is not None and ahead is not None and jump > ahead:
            frames = reader.frames_from(jump)
        frame = next((one for one in frames if _pts(one) >= target), None)
        if frame is None or _pts(frame) != target:
            yield None
            return
        position = target
        yield frame


def _choose(reader: Reader, rate: Fraction) -> tuple[tuple[int, int], list[tuple[int, Fraction]]]:
    """Upright size, and (pts, seconds after the first) of the frames shown at some k / rate."""
    chosen: list[tuple[int, Fraction]] = []
    size, first = (0, 0), 0
    shown: tuple[int, Fraction] | None = None
    duration = Fraction(0)
    for frame in reader.frames():
        pts = _pts(frame)
        if shown is None:
            first, size = pts, _upright_size(frame)
            shown = (pts, Fraction(0))
        now = (pts - first) * reader.time_base
        if now < shown[1]:
            raise DataError(
                f"video's times run backwards, from {float(shown[1]):.3f} to {float(now):.3f} "
                "seconds after its first frame; write it anew (ffmpeg)"
            )
        # Of frames of one time the first stands for all: it is the one that is found again.
        if now > shown[1]:
            if _is_sampled(shown[1], now, rate):
                chosen.append(shown)
            duration, shown = now - shown[1], (pts, now)
    if shown is None:
        raise DataError("video has no frames; leave it out")
    # The last is shown as long as the one before it: encoders seldom write its duration.
    if not chosen or _is_sampled(shown[1], shown[1] + duration, rate):
        chosen.append(shown)
    return size, chosen


def _is_sampled(start: Fraction, end: Fraction, rate: Fraction) -> bool:
    """Whether some k / rate lies from `start` to before `end`."""
    return math.ceil(start * rate) < end * rate


def _evenly(frames: Sequence[tuple[int, Fraction]], count: int) -> list[tuple[int, Fraction]]:
    """`count` of the frames, the first and the last among them if there are two."""
    last, steps = len(frames) - 1, max(1, count - 1)
    return [frames[(2 * step * last + steps) // (2 * steps)] for step in range(count)]


def _pts(frame: VideoFrame) -> int:
    if frame.pts is None:
        raise DataError("video has a frame without a time; write it anew (ffmpeg)")
    return frame.pts


def _turns(frame: VideoFrame) -> int:
    """Quarter turns, against the clock, that make it upright."""
    return round(frame.rotation / 90) % 4


def _upright_size(frame: VideoFrame) -> tuple[int, int]:
    size = (frame.height, frame.width)
    return size[::-1] if _turns(frame) % 2 else size


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    pixels = frame.to_ndarray(format="rgb24", threads=1)
    return np.ascontiguousarray(np.rot90(pixels, _turns(frame)))
