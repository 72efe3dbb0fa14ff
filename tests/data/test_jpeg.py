"""JPEG through simplejpeg: Pillow's pixels, and stricter than Pillow when a set is built."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data import jpeg
from megatron_vlm.data.jpeg import check_jpeg, decode_jpeg
from megatron_vlm.data.pictures import check_picture, decode_picture
from megatron_vlm.errors import DataError
from tests.data.photographs import NAMES, photograph
from tests.data.samples import encoded, picture

pytestmark = pytest.mark.unit

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}),
    "full_chroma": ("RGB", {"subsampling": 0}),
    "half_chroma": ("RGB", {"subsampling": 1}),
    "progressive": ("RGB", {"progressive": True}),
    "coarse": ("RGB", {"quality": 10}),
    "rgb": ("RGB", {"keep_rgb": True}),
    "gray": ("L", {}),
    "progressive_gray": ("L", {"progressive": True}),
    "restarts": ("RGB", {"restart_marker_rows": 1}),
}


def jpeg_of(kind: str, height: int = 61, width: int = 83) -> bytes:
    mode, options = KINDS[kind]
    return encoded(picture(height, width).convert(mode), "JPEG", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_pillow_s(kind: str) -> None:
    data = jpeg_of(kind)
    found = decode_jpeg(data, 61, 83)
    assert found is not None
    np.testing.assert_array_equal(found, np.asarray(Image.open(BytesIO(data)).convert("RGB")))
    assert check_picture(data) == (61, 83, "jpg")


@pytest.mark.parametrize("name", [name for name in NAMES if photograph(name)[:2] == b"\xff\xd8"])
def test_photographs_are_pillow_s(name: str) -> None:
    image = Image.open(BytesIO(photograph(name)))
    found = decode_jpeg(photograph(name), image.height, image.width)
    assert found is not None
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_what_is_left_to_pillow() -> None:
    ink = encoded(picture(16, 24).convert("CMYK"), "JPEG")
    rgb = jpeg_of("baseline")
    for data, size in (
        (ink, (16, 24)),
        (encoded(picture(16, 24)), (16, 24)),
        (rgb, (83, 61)),
        (rgb[: len(rgb) // 2], (61, 83)),
        (b"", (1, 1)),
    ):
        assert decode_jpeg(data, *size) is None


def test_room_is_reused_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_KEPT_BYTES", 70 * 70 * 3)
    monkeypatch.setattr(jpeg, "_scratch", type(jpeg._scratch)())
    kept = []
    for side in (50, 40, 70, 90, 60):
        data = jpeg_of("baseline", side, side)
        found = decode_jpeg(data, side, side)
        assert found is not None
        np.testing.assert_array_equal(found, np.asarray(Image.open(BytesIO(data))))
        kept.append(jpeg._scratch.bytes.size)
    assert kept == [side * side * 3 for side in (50, 50, 70, 70, 70)]


def damage(data: bytes, number: int) -> bytes:
    """A bit flipped, the end cut off, or some bytes overwritten."""
    rng = np.random.default_rng(number)
    place = int(rng.integers(len(data)))
    changed = bytearray(data)
    if number % 3 == 0:
        changed[place] ^= 1 << int(rng.integers(8))
    elif number % 3 == 1:
        del changed[place:]
    else:
        changed[place : place + 20] = rng.bytes(20)
    return bytes(changed)


def is_refused(check: Any, data: bytes) -> bool:
    try:
        check(data)
    except DataError:
        return True
    return False


def test_a_build_refuses_all_that_pillow_does_and_more() -> None:
    by_pillow = by_us = 0
    for number in range(240):
        data = damage(jpeg_of(list(KINDS)[number % len(KINDS)]), number)
        pillow, ours = is_refused(decode_picture, data), is_refused(check_picture, data)
        assert ours or not pillow
        by_pillow, by_us = by_pillow + pillow, by_us + ours
    assert by_us > 1.5 * by_pillow > 100


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damage_that_pillow_makes_up_for(mode: str) -> None:
    good = encoded(picture(64, 64).convert(mode), "JPEG", quality=95)
    assert check_picture(good) == (64, 64, "jpg")
    # Zeros in the middle of the pixels: fewer of them than the header promises.
    middle = len(good) // 2
    bad = good[:middle] + bytes(200) + good[middle + 200 :]
    assert decode_picture(bad).shape == (64, 64, 3)
    with pytest.raises(DataError, match="picture is damaged .*restore it or leave it out"):
        check_picture(bad)


def test_rare_sampling_is_no_damage() -> None:
    data = bytearray(jpeg_of("full_chroma", 64, 64))
    start = data.index(b"\xff\xc0")
    data[start + 11], data[start + 14] = 0x21, 0x21
    assert not check_jpeg(bytes(data), 64, 64)
    assert decode_jpeg(bytes(data), 64, 64) is None
    assert check_picture(bytes(data)) == (64, 64, "jpg")


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_read_without_decoding(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(16, 24), "JPEG", exif=exif)
    assert check_picture(data)[:2] == decode_picture(data).shape[:2]
