"""Decoding to RGB for every kind of picture, and patches against a loop over pixels."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data import pictures
from megatron_vlm.data.pictures import check_picture, decode_picture, patches
from megatron_vlm.errors import DataError
from tests.data.samples import VISION, encoded, picture

pytestmark = pytest.mark.unit

GRAY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def test_rgb_png_is_exact() -> None:
    image = picture(9, 13)
    decoded = decode_picture(encoded(image))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = np.asarray(picture(5, 8))
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # the viewer turns it clockwise
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(decode_picture(data), upright)
    assert check_picture(data) == (5, 8, "png")


def test_transparency_is_laid_over_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :] = [(10, 20, 30, 255), (10, 20, 30, 0), (100, 0, 0, 51)]
    decoded = decode_picture(encoded(Image.fromarray(rgba)))
    # 51/255 = 0.2 of the colour over white
    np.testing.assert_array_equal(decoded[0], [(10, 20, 30), (255, 255, 255), (224, 204, 204)])


def test_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.putpixel((1, 0), 1)
    plain = decode_picture(encoded(image))
    np.testing.assert_array_equal(plain[0], [(1, 2, 3), (200, 100, 50)])
    clear = decode_picture(encoded(image, transparency=1))
    np.testing.assert_array_equal(clear[0], [(1, 2, 3), (255, 255, 255)])


@pytest.mark.parametrize(
    ("make", "format"),
    [
        (lambda: Image.fromarray(GRAY), "PNG"),
        (lambda: Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"),  # 16-bit gray
        (lambda: Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF"),
        (lambda: Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"),
        (lambda: Image.fromarray(GRAY).convert("LA"), "PNG"),
        (lambda: Image.fromarray(GRAY), "BMP"),
        (lambda: Image.fromarray(GRAY), "PPM"),
        (lambda: Image.fromarray(GRAY), "GIF"),
    ],
)
def test_gray_of_every_depth(make: Callable[[], Image.Image], format: str) -> None:
    decoded = decode_picture(encoded(make(), format))
    np.testing.assert_array_equal(decoded, np.stack([GRAY] * 3, axis=-1))


def test_one_bit_and_cmyk() -> None:
    bits = Image.fromarray(GRAY > 100)
    expected = np.where(GRAY > 100, 255, 0)
    np.testing.assert_array_equal(decode_picture(encoded(bits))[..., 0], expected)
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = decode_picture(encoded(ink, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats(format: str) -> None:
    smooth = np.linspace(0, 255, 32 * 48).reshape(32, 48).astype(np.uint8)
    data = encoded(Image.fromarray(np.stack([smooth] * 3, -1)), format)
    assert np.abs(decode_picture(data).astype(int) - smooth[..., None]).mean() < 4
    height, width, extension = check_picture(data)
    assert (height, width) == (32, 48)
    assert extension == {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jp2"}[format]


def test_two_pictures_of_a_phone_in_one_file() -> None:
    flat = Image.new("RGB", (20, 10), (250, 20, 20))
    data = encoded(flat, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert check_picture(data) == (10, 20, "jpg")
    assert np.abs(decode_picture(data).astype(int) - (250, 20, 20)).max() < 5


def test_damaged_pictures() -> None:
    png = encoded(picture(40, 40))
    jpeg = encoded(picture(40, 40), "JPEG")
    flipped = bytearray(encoded(Image.new("RGB", (64, 64)), compress_level=0))
    place = flipped.index(b"IDAT") + 100
    flipped[place] ^= 0xFF
    for data in (png[: len(png) // 2], jpeg[: len(jpeg) // 2], b"", b"text", bytes(flipped)):
        with pytest.raises(DataError, match="picture"):
            check_picture(data)


def test_checksums_are_checked_when_a_set_is_built() -> None:
    data = bytearray(encoded(picture(8, 8)))
    data[data.index(b"IEND") - 5] ^= 0xFF  # the last byte of the checksum of the pixels
    decode_picture(bytes(data))
    with pytest.raises(DataError, match="picture is damaged"):
        check_picture(bytes(data))


def test_programs_that_draw_are_not_pictures() -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="no known format .PNG, JPEG"):
        decode_picture(script)


def test_integers_without_an_agreed_gray() -> None:
    with pytest.raises(DataError, match="beyond 16 bits"):
        decode_picture(encoded(Image.fromarray(np.array([[70000]], np.int32)), "TIFF"))
    with pytest.raises(DataError, match="mode F"):
        decode_picture(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


@pytest.mark.parametrize("side", [9_000, 20_000, 50_000])
def test_decompression_is_bounded(side: int) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    with pytest.raises(DataError, match="more than 80000000 pixels|DecompressionBomb"):
        check_picture(bomb + chunk(b"IEND", b""))


def test_bound_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURE_PIXELS", 100)
    assert decode_picture(encoded(picture(10, 10))).shape == (10, 10, 3)
    with pytest.raises(DataError, match="more than 100 pixels .101x1"):
        decode_picture(encoded(picture(1, 101)))


PEAK = """
import resource, sys
from PIL import Image
from megatron_vlm.data.pictures import decode_picture
decode_picture(open(sys.argv[1], "rb").read())  # what decoding loads once
encoded = open(sys.argv[2], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode_picture(encoded)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P"])
def test_peak_memory_of_a_decode(tmp_path: Path, mode: str) -> None:
    side = 4000
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("small", 8), ("large", side)):
        array = np.zeros((size, size), np.uint16)
        image = Image.fromarray(array) if mode == "I;16" else Image.new(mode, (size, size))
        image.save(tmp_path / f"{name}.png", exif=exif)
    command = [sys.executable, "-c", PEAK, tmp_path / "small.png", tmp_path / "large.png"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # 8 bytes a pixel, and the band that is converted at a time.
    assert int(done.stdout) < 8 * side**2 + 24 * 2**20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "1"])
def test_bands_fit_together(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(23, 17)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
    elif mode == "RGBA":
        image.putalpha(picture(23, 17, 1).convert("L"))
    else:
        image = image.convert(mode)
    data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    whole = decode_picture(data)
    monkeypatch.setattr(pictures, "_BLOCK_PIXELS", 17 * 4)
    np.testing.assert_array_equal(decode_picture(data), whole)


def test_big_endian_deep_gray() -> None:
    values = np.arange(0, 65535, 700, dtype=np.uint16).reshape(2, 47)
    little = encoded(Image.fromarray(values), "TIFF")
    fields = struct.unpack("<2sHI", little[:8])
    assert fields[0] == b"II"
    image = Image.frombytes("I;16B", (47, 2), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode_picture(encoded(image, "TIFF")), decode_picture(little))


def test_threads_do_not_decode_more_than_the_bound_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "MAX_PICTURE_PIXELS", 250)
    convert, lock = pictures._to_rgb, threading.Lock()
    inside, most, met = 0, 0, threading.Event()

    def counted(image: Image.Image) -> np.ndarray:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            if inside == 2:
                met.set()
        met.wait(5)
        time.sleep(0.02)
        with lock:
            inside -= 1
        return convert(image)

    monkeypatch.setattr(pictures, "_to_rgb", counted)
    data = encoded(picture(10, 10))
    with ThreadPoolExecutor(6) as pool:
        found = [task.result() for task in [pool.submit(decode_picture, data) for _ in range(12)]]
    assert all(array.shape == (10, 10, 3) for array in found)
    assert most == 2


def test_want_of_memory_is_not_the_picture_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image) -> np.ndarray:
        raise MemoryError

    data = encoded(picture(10, 10))
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_to_rgb", fail)
        with pytest.raises(MemoryError):
            check_picture(data)
    assert check_picture(data) == (10, 10, "png")  # its room was given back


def loop_patches(image: Image.Image, grid_h: int, grid_w: int) -> np.ndarray:
    """The patch order, spelled out with Pillow's resize and crop and plain loops."""
    image = image.resize((grid_w * 14, grid_h * 14), Image.Resampling.BICUBIC)
    out = []
    for block_y in range(grid_h // 2):
        for block_x in range(grid_w // 2):
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                left, top = (block_x * 2 + x) * 14, (block_y * 2 + y) * 14
                crop = image.crop((left, top, left + 14, top + 14))
                vector = []
                for channel, plane in enumerate(crop.split()):
                    mean, deviation = VISION.image_mean[channel], VISION.image_std[channel]
                    pixels = plane.tobytes()
                    vector += [(value / 255 - mean) / deviation for value in pixels]
                out.append(vector)
    return np.array(out)


@pytest.mark.parametrize("size", [(56, 84), (57, 200), (20, 31)])
def test_patches_against_a_loop(size: tuple[int, int]) -> None:
    image = picture(*size)
    result = patches(np.asarray(image), 4, 6, VISION)
    assert result.dtype == np.float32
    assert result.shape == (24, 588)
    levels = 2 if size != (56, 84) else 0
    atol = levels / 255 / min(VISION.image_std) + 2e-6
    np.testing.assert_allclose(result, loop_patches(image, 4, 6), atol=atol, rtol=0)


def test_a_patch_meets_a_convolution_weight() -> None:
    import torch

    image = picture(28, 56)
    weight = torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    normal = torch.from_numpy(np.asarray(image) / 255.0).float().permute(2, 0, 1)
    mean, deviation = torch.tensor(VISION.image_mean), torch.tensor(VISION.image_std)
    normal = (normal - mean[:, None, None]) / deviation[:, None, None]
    expected = torch.nn.functional.conv2d(normal[None], weight, stride=14)[0]
    given = torch.from_numpy(patches(np.asarray(image), 2, 4, VISION)) @ weight.flatten(1).T
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    for row, (y, x) in zip(given, order, strict=True):
        torch.testing.assert_close(row, expected[:, y, x], atol=1e-4, rtol=1e-4)


def test_patches_fill_a_given_array() -> None:
    image = np.asarray(picture(28, 28))
    out = np.full((4, 588), np.nan, np.float32)
    assert patches(image, 2, 2, VISION, out) is out
    np.testing.assert_array_equal(out, patches(image, 2, 2, VISION))
