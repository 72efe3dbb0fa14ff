"""Sampling and decoding of videos against a plain sequential decode, and what is refused."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from megatron_vlm.data import containers
from megatron_vlm.data.containers import Reader
from megatron_vlm.data.video import decode_frames, sample_video, timestamp
from megatron_vlm.errors import DataError
from tests.data.samples import encoded as picture_file
from tests.data.samples import picture
from tests.data.videos import decoded, drawn, time_base, turned, video

pytestmark = pytest.mark.unit

KINDS: dict[str, dict[str, Any]] = {
    "h264": {},
    "h264_fragments": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_matroska": {"kind": "matroska"},
    "h264_matroska_without_index": {"kind": "matroska", "options": {"live": "1"}},
    "h264_transport_stream": {"kind": "mpegts"},
    "h264_flash": {"kind": "flv"},
    "hevc": {"codec": "libx265"},
    "mpeg4": {"codec": "mpeg4"},
    "mpeg4_avi": {"kind": "avi", "codec": "mpeg4"},
    "vp9": {"kind": "webm", "codec": "libvpx-vp9"},
    "mpeg2": {"kind": "mpeg", "codec": "mpeg2video", "fps": 25},
    "wmv": {"kind": "asf", "codec": "wmv2"},
}
UNEVEN = [0, 1, 2, 3, 9, 10, 11, 35, 36, 60, 61, 62, 63, 64, 65, 66, 90, 200, 201, 202]


@lru_cache
def of_kind(name: str) -> bytes:
    return video(**KINDS[name], frames=100)


@lru_cache
def uneven() -> bytes:
    return video(frames=len(UNEVEN), pts=UNEVEN)


def shown_at(encoded: bytes, fps: float, end: Fraction) -> list[int]:
    """The pts shown at each k / fps before `end`, by search over all frames."""
    times, base = sorted(decoded(encoded)), time_base(encoded)
    chosen: list[int] = []
    k = 0
    while k / Fraction(str(fps)) < end:
        moment = k / Fraction(str(fps))
        shown = [one for one in times if (one - times[0]) * base <= moment][-1]
        if shown not in chosen:
            chosen.append(shown)
        k += 1
    return chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fps", [0.3, 3.0, 50.0])
def test_frames_shown_at_even_times(kind: str, fps: float) -> None:
    data = of_kind(kind)
    sample = sample_video(data, fps, 10**6)
    rate = KINDS[kind].get("fps", 10)
    end = Fraction(100, rate) - Fraction(1, 1000)  # Matroska and Flash count milliseconds
    assert list(sample.pts) == shown_at(data, fps, end)
    base, first = time_base(data), min(decoded(data))
    assert list(sample.seconds) == [float((one - first) * base) for one in sample.pts]
    assert (sample.height, sample.width) == (48, 64)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 10.0, 0.1])
def test_uneven_times(fps: float) -> None:
    data = uneven()
    assert sorted(decoded(data)) == [one * 1024 for one in UNEVEN]
    sample = sample_video(data, fps, 10**6)
    assert list(sample.pts) == shown_at(data, fps, Fraction(203, 10))


def test_first_frame_is_always_there() -> None:
    assert sample_video(video(frames=1), 1.0, 128).seconds == (0.0,)
    assert sample_video(video(frames=3), 0.001, 128).seconds == (0.0,)


def test_times_need_not_start_at_zero() -> None:
    data = video(frames=30, pts=range(70, 100), kind="matroska")
    sample = sample_video(data, 1.0, 10**6)
    assert sample.pts == (7000, 8000, 9000)
    assert sample.seconds == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("max_tokens", "level", "count"),
    [
        (6400, 640, 10),
        (6399, 512, 10),
        (3840, 384, 10),
        (1280, 128, 10),
        (1279, 128, 9),
        (700, 128, 5),
        (383, 128, 2),
        (128, 128, 1),
    ],
)
def test_levels(max_tokens: int, level: int, count: int) -> None:
    sample = sample_video(of_kind("h264"), 1.0, max_tokens)
    assert (sample.level, len(sample.pts)) == (level, count)
    assert len(sample.seconds) == count
    spread = np.linspace(0, 9, count) if count > 1 else np.zeros(1)
    assert np.abs(np.array(sample.seconds) - spread).max() <= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_frames_are_those_of_a_sequential_decode(kind: str) -> None:
    data = of_kind(kind)
    frames = decoded(data)
    times = sorted(frames)
    for places in ([0], [99], [50], [0, 1, 2], [3, 40, 41, 95], list(range(0, 100, 9)), []):
        wanted = [times[place] for place in places]
        found = list(decode_frames(data, wanted))
        assert len(found) == len(wanted)
        for one, image in zip(wanted, found, strict=True):
            assert image.dtype == np.uint8 and image.flags.c_contiguous
            np.testing.assert_array_equal(image, frames[one])


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames decoded by each reader that was closed."""
    counts: list[int] = []
    leave = Reader.__exit__

    def counted(self: Reader, *args: Any) -> None:
        counts.append(self._decoded)
        leave(self, *args)

    monkeypatch.setattr(Reader, "__exit__", counted)
    return counts


@pytest.mark.parametrize("kind", ["h264", "h264_matroska", "hevc", "mpeg4", "vp9"])
def test_what_lies_between_is_skipped(kind: str, decodes: list[int]) -> None:
    data = of_kind(kind)
    times = sorted(decoded(data))
    assert len(list(decode_frames(data, [times[2], times[97]]))) == 2
    assert len(decodes) == 1
    assert decodes[0] < 50
    decodes.clear()
    list(decode_frames(data, times))
    assert decodes == [100]  # each once


def test_frames_left_out_after_a_jump_are_found_without_one(
    monkeypatch: pytest.MonkeyPatch, decodes: list[int]
) -> None:
    jump = Reader.frames_from

    def lame(self: Reader, keyframe: int) -> Iterator[Any]:
        frames = jump(self, keyframe)
        for _ in range(30):
            next(frames)
        return frames

    monkeypatch.setattr(Reader, "frames_from", lame)
    data = of_kind("h264")
    frames = decoded(data)
    times = sorted(frames)
    wanted = [times[5], times[60], times[62], times[99]]
    for one, image in zip(wanted, decode_frames(data, wanted), strict=True):
        np.testing.assert_array_equal(image, frames[one])
    assert len(decodes) == 2

    def stumbles(self: Reader, keyframe: int) -> Iterator[Any]:
        raise av.error.InvalidDataError(1, "Invalid data")

    monkeypatch.setattr(Reader, "frames_from", stumbles)
    for one, image in zip(wanted, decode_frames(data, wanted), strict=True):
        np.testing.assert_array_equal(image, frames[one])


def test_frames_that_are_not_there() -> None:
    data = of_kind("h264")
    for wanted in ([512], [-1], [10**9], [0, 1024, 5000]):
        frames = decode_frames(data, wanted)
        with pytest.raises(DataError, match=f"no frame at {wanted[-1]} .*build the data set again"):
            list(frames)
    for wanted in ([1024, 0], [0, 0]):
        with pytest.raises(ValueError, match="ascend"):
            decode_frames(data, wanted)


@pytest.mark.parametrize("quarters", range(4))
def test_upright(quarters: int) -> None:
    plain = of_kind("h264")
    data = turned(plain, quarters)
    sample = sample_video(data, 1.0, 10**6)
    assert (sample.height, sample.width) == ((64, 48) if quarters % 2 else (48, 64))
    (image,) = decode_frames(data, [0])
    assert image.shape == (sample.height, sample.width, 3)
    np.testing.assert_array_equal(image, np.rot90(decoded(plain)[0], -quarters))
    # The bright corner, top left as stored, is where the header's matrix sends it.
    corner = [(0, 0), (0, -1), (-1, -1), (-1, 0)][quarters]
    others = {(0, 0), (0, -1), (-1, -1), (-1, 0)} - {corner}
    assert image[corner].mean() > 150
    assert all(image[other].mean() < 150 for other in others)


def test_pixels_are_what_was_drawn() -> None:
    data = video("mp4", "libx264", frames=10, options={"crf": "1"})
    images = list(decode_frames(data, [0, 3072, 9216]))
    for number, image in zip((0, 3, 9), images, strict=True):
        assert np.abs(image.astype(int) - drawn(number, 48, 64)).mean() < 4


def refused(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        sample_video(data, 1.0, 81920)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("kind", ["h264", "h264_fragments", "h264_matroska", "mpeg4_avi", "vp9"])
def test_truncated(kind: str, part: float) -> None:
    data = of_kind(kind)
    refused(data[: int(len(data) * part)], "cut off|cannot be decoded|no frames")


def test_truncated_with_the_index_in_front() -> None:
    data = video(frames=100, options={"movflags": "faststart"})
    assert data.index(b"moov") < data.index(b"mdat")
    assert len(sample_video(data, 1.0, 81920).pts) == 10
    for part in (0.5, 0.7, 0.99):
        refused(data[: int(len(data) * part)], "cut off")


def test_damaged_pixels() -> None:
    for kind in ("h264", "mpeg4_avi"):
        data = bytearray(video(**KINDS[kind], frames=40, size=(96, 128)))
        start = data.index(b"mdat" if kind == "h264" else b"movi") + 1500
        data[start : start + 400] = bytes(range(200)) * 2
        refused(bytes(data), "damaged")


def test_what_is_no_video() -> None:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST"
    script = b"ffconcat version 1.0\nfile '/etc/hostname'\n"
    files = [b"", b"text" * 100, playlist, script]
    files += [picture_file(picture(40, 40), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")]
    for data in files:
        refused(data, "damaged or of no known kind")
    refused(video(frames=0, audio=True), "has no video")
    refused(video("matroska", "ffv1", frames=10), "has no video of a known codec")
    with_sound = video(frames=30, audio=True)
    assert len(sample_video(with_sound, 1.0, 81920).pts) == 3


def test_a_song_s_cover_is_no_video() -> None:
    data = video("mp4", "mjpeg", frames=1, audio=True, cover=True)
    with av.open(BytesIO(data)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    refused(data, "has no video")


def test_one_thread_a_video() -> None:
    with Reader(of_kind("h264")) as reader:
        assert next(iter(reader.frames())).width == 64
        assert reader._stream.codec_context.thread_count == 1


def test_times_that_run_backwards() -> None:
    part = video("mpegts", frames=30)
    refused(part + part, "run backwards")


def test_a_size_that_changes() -> None:
    first = video("mpegts", frames=30)
    second = video("mpegts", frames=30, size=(96, 64), pts=range(50, 80))
    refused(first + second, "changes its size from 64x48 to 64x96")


def test_titles_in_any_encoding() -> None:
    data = video(frames=20, options={"movflags": "use_metadata_tags"}, title="12345678")
    other = data.replace(b"12345678", b"\xfc\xe4\xf6\xff1234")
    assert other != data
    assert sample_video(other, 1.0, 81920) == sample_video(data, 1.0, 81920)


def test_headers_that_lie() -> None:
    data = of_kind("h264")
    expected = sample_video(data, 1.0, 81920)
    lying = bytearray(data)
    for box, place in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
        start = data.index(box) + 4 + place
        lying[start : start + 4] = b"\x7f\xff\xff\xff"
    assert sample_video(bytes(lying), 1.0, 81920) == expected
    data = of_kind("mpeg4_avi")
    expected = sample_video(data, 1.0, 81920)
    for count in (1, 7, 10**9):
        lying = bytearray(data)
        start = data.index(b"avih") + 8 + 16
        lying[start : start + 4] = count.to_bytes(4, "little")
        start = data.index(b"strh") + 8 + 32
        lying[start : start + 4] = count.to_bytes(4, "little")
        assert sample_video(bytes(lying), 1.0, 81920) == expected


def test_of_frames_of_one_time_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = Reader.frames

    def doubled(self: Reader) -> Iterator[Any]:
        for number, frame in enumerate(frames(self)):
            if number in (11, 12, 31):
                frame.pts = 1024 * (number - number % 10)
            yield frame

    data = of_kind("h264")
    expected = sample_video(data, 1.0, 81920)
    monkeypatch.setattr(Reader, "frames", doubled)
    sample = sample_video(data, 1.0, 81920)
    assert sample == expected
    images = list(decode_frames(data, [10240, 30720]))
    for one, image in zip((10240, 30720), images, strict=True):
        np.testing.assert_array_equal(image, decoded(data)[one])


def test_a_frame_a_year_later() -> None:
    later = 10 * 86400 * 365
    data = video("matroska", frames=4, pts=[0, 1, 2, later])
    started = time.perf_counter()
    sample = sample_video(data, 2.0, 81920)
    assert sample.seconds == (0.0, 0.2, later / 10)
    assert len(list(decode_frames(data, sample.pts))) == 3
    assert time.perf_counter() - started < 5


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    data = of_kind("h264")
    with monkeypatch.context() as patch:
        patch.setattr(containers, "MAX_FRAMES", 99)
        refused(data, "more than 99 frames of 64x48 pixels")
        patch.setattr(containers, "MAX_FRAMES", 100)
        sample_video(data, 1.0, 81920)
    with monkeypatch.context() as patch:
        patch.setattr(containers, "MAX_PIXELS", 64 * 48 * 50)
        refused(data, "more than 50 frames of 64x48 pixels")
        assert len(list(decode_frames(data, [0, 1024]))) == 2
    monkeypatch.setattr(containers, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    refused(data, "64x48 pixels|cannot be decoded")


def test_arguments() -> None:
    data = of_kind("h264")
    for fps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match=f"fps {fps}: expected"):
            sample_video(data, fps, 81920)
    with pytest.raises(DataError, match="max_tokens 127: one frame needs at least 128"):
        sample_video(data, 1.0, 127)
    for levels in ((), (0, 5)):
        with pytest.raises(DataError, match="levels"):
            sample_video(data, 1.0, 81920, levels)
    assert sample_video(data, 1.0, 100, (3, 70, 10)).level == 10


def test_many_threads() -> None:
    names = list(KINDS)[:6] * 3

    def work(name: str) -> tuple[Any, list[np.ndarray]]:
        sample = sample_video(of_kind(name), 2.0, 81920)
        return sample, list(decode_frames(of_kind(name), sample.pts[::3]))

    expected = {name: work(name) for name in set(names)}
    with ThreadPoolExecutor(4) as pool:
        for name, (sample, images) in zip(names, pool.map(work, names), strict=True):
            assert sample == expected[name][0]
            for image, other in zip(images, expected[name][1], strict=True):
                np.testing.assert_array_equal(image, other)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'megatron-vlm\[video\]'"):
        sample_video(b"", 1.0, 81920)


def test_timestamps() -> None:
    found = [timestamp(seconds) for seconds in (0, 1.5, 12.04, 3600)]
    assert found == ["[0.0 second]", "[1.5 second]", "[12.0 second]", "[3600.0 second]"]


def test_want_of_memory_is_not_the_video_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Reader) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "frames", fail)
        with pytest.raises(MemoryError):
            sample_video(of_kind("h264"), 1.0, 81920)

    def absurd(self: Reader) -> Any:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(Reader, "frames", absurd)
    refused(of_kind("h264"), "Cannot allocate memory")
