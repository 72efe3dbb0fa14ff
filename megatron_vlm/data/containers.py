"""Video files opened with PyAV: what may be opened, how much is decoded, what counts as damage.

Files are read from memory and never refer to others: only the containers and codecs listed here are
opened, and playlists, scripts and pictures under a video's name are none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from typing import TYPE_CHECKING

from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_FRAME_PIXELS = 1 << 24
"""Most pixels of a frame; 8192 x 2048, say. Our choice: decoders hold some 16 frames."""
MAX_FRAMES = 216_000
"""Most frames decoded of one video. Our choice: an hour at 60 frames a second."""
MAX_PIXELS = 108_000 * 1920 * 1080
"""Most pixels decoded of one video. Our choice: an hour of 1080p at 30 frames a second."""

CONTAINERS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
"""Names of ffmpeg's readers; mov reads MP4 and its kin."""
CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "theora"),
    *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v2", "msmpeg4", "h263", "flv", "mjpeg"),
    *("wmv1", "wmv2", "wmv3", "vc1", "prores"),
)
"""Names of ffmpeg's decoders."""

_SEEKABLE = ("mov", "matroska")
"""Containers that store the time of every frame, so that a frame found after a jump has the same
time as without one."""


class Reader:
    """One opened video. Not to be shared between threads; decodes on the caller's alone."""

    def __init__(self, encoded: bytes) -> None:
        """Open it.

        Raises:
            DataError: PyAV is not installed, there is no video in it, or it is cut off.
            Exception: whatever PyAV raises; see `faults`.
        """
        try:
            import av
        except ImportError as error:
            raise DataError(
                "videos need PyAV, which is not installed; pip install 'megatron-vlm[video]'"
            ) from error
        options = {
            "format_whitelist": ",".join(CONTAINERS),
            "codec_whitelist": ",".join(CODECS),
            "protocol_whitelist": "none",
            # Opening decodes some frames already.
            "max_pixels": str(MAX_FRAME_PIXELS),
            "threads": "1",
        }
        self._container = av.open(
            BytesIO(encoded),
            "r",
            options=options,
            metadata_errors="replace",  # titles in other encodings
        )
        try:
            self._kind = self._container.format.name.split(",")[0]
            _check_complete(encoded, self._kind)
            self._stream = self._video()
        except BaseException:
            self._container.close()
            raise
        self._decoded = 0

    def __enter__(self) -> Reader:
        """Itself; closed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self._container.close()

    @property
    def time_base(self) -> Fraction:
        """Seconds of one tick of the stream's times."""
        return self._stream.time_base or Fraction(1, 1_000_000)

    def frames(self) -> Iterator[VideoFrame]:
        """Frames from the current place on, in order of display.

        Raises:
            DataError: a frame is damaged, of another size than the first, or one too many.
        """
        stream = self._stream
        size = None
        for frame in self._container.decode(stream):
            self._decoded += 1
            pixels = frame.width * frame.height
            if pixels > MAX_FRAME_PIXELS:
                raise DataError(_too_large(frame.width, frame.height))
            if self._decoded > MAX_FRAMES or self._decoded * pixels > MAX_PIXELS:
                raise DataError(
                    f"video has more than {self._decoded - 1} frames of {frame.width}x"
                    f"{frame.height} pixels (at most {MAX_FRAMES} frames and {MAX_PIXELS} pixels "
                    "in all); cut it or reduce it"
                )
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise DataError(
                    f"video changes its size from {size[0]}x{size[1]} to {frame.width}x"
                    f"{frame.height} pixels; cut it there"
                )
            if frame.is_corrupt:
                raise DataError(
                    f"video is damaged (frame {self._decoded} cannot be decoded in full); restore "
                    "it or leave it out"
                )
            yield frame

    def frames_from(self, keyframe: int) -> Iterator[VideoFrame]:
        """Frames from an indexed keyframe on."""
        self._container.seek(keyframe, stream=self._stream)
        return self.frames()

    def keyframes(self) -> list[int]:
        """Times of the indexed keyframes, ascending, in ticks; none where a jump is not exact."""
        if self._kind not in _SEEKABLE:
            return []
        if self._kind == "matroska":
            # It reads its index when it is first used, and not before.
            self._container.seek(self._stream.start_time or 0, stream=self._stream)
        return sorted(one.timestamp for one in self._stream.index_entries if one.is_keyframe)

    def _video(self) -> VideoStream:
        from av.stream import Disposition

        for stream in self._container.streams.video:
            if stream.disposition & Disposition.attached_pic:
                continue  # the cover of a song
            context = stream.codec_context
            if context is None or context.name not in CODECS:
                continue
            if context.width * context.height > MAX_FRAME_PIXELS:
                raise DataError(_too_large(context.width, context.height))
            context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            context.thread_count = 1
            return stream
        raise DataError(
            f"file has no video of a known codec ({', '.join(CODECS)}); convert it or leave it out"
        )


@contextmanager
def faults() -> Iterator[None]:
    """Whatever PyAV raises as one DataError, but for want of memory.

    Ffmpeg's own want of memory is the file's: it comes of sizes in damaged headers.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if type(error) is MemoryError:
            raise
        detail = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"video cannot be decoded ({detail}): it is damaged or of no known kind "
            f"({', '.join(CONTAINERS)}); restore it or leave it out"
        ) from error


def _too_large(width: int, height: int) -> str:
    return (
        f"video has frames of {width}x{height} pixels, of more than {MAX_FRAME_PIXELS} together; "
        "reduce it first"
    )


def _check_complete(encoded: bytes, kind: str) -> None:
    """Refuse a file that ends before its outermost parts do: ffmpeg reads what is there."""
    parts = {"mov": _boxes, "matroska": _elements, "avi": _chunks}.get(kind)
    end = max(parts(encoded), default=0) if parts else 0
    if end > len(encoded):
        raise DataError(
            f"video is cut off: it has {len(encoded)} bytes of {end}; restore it or leave it out"
        )


def _boxes(encoded: bytes) -> Iterator[int]:
    """Ends of the boxes of an MP4 (ISO/IEC 14496-12, 4.2)."""
    start = 0
    while start + 8 <= len(encoded):
        size = int.from_bytes(encoded[start : start + 4])
        if size == 1:
            size = int.from_bytes(encoded[start + 8 : start + 16])
        if size < 8:  # 0: to the end of the file
            return
        start += size
        yield start


def _elements(encoded: bytes) -> Iterator[int]:
    """Ends of the header and the segment of a Matroska (RFC 8794, 4 to 6)."""
    start = 0
    for _ in range(2):
        if start >= len(encoded):
            return
        start += max(1, 9 - encoded[start].bit_length())  # the id
        if start >= len(encoded):
            return
        length = 9 - encoded[start].bit_length()
        size = int.from_bytes(encoded[start : start + length]) & ((1 << 7 * length) - 1)
        if length > 8 or size == (1 << 7 * length) - 1:  # of unknown size, as of live streams
            return
        start += length + size
        yield start


def _chunks(encoded: bytes) -> Iterator[int]:
    """Ends of the chunks of an AVI; one of size 0 was never completed."""
    start = 0
    while encoded[start : start + 4] == b"RIFF":
        size = int.from_bytes(encoded[start + 4 : start + 8], "little")
        if not size:
            return
        start += 8 + size + size % 2
        yield start - size % 2
