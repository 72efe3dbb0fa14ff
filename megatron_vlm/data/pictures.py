"""From an encoded picture to RGB pixels, and from pixels to normalised patches.

The builder and the trainer decode with the same function, so what was accepted when a set was
built is what is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Condition
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.schema import VisionConfig

MAX_PICTURE_PIXELS = 80_000_000
"""Most pixels a picture may decode to, and most that are decoded at once in a process, on however
many threads. Our choice, below Pillow's own warning. Measured peak of a decode, the result
included: 8 bytes a pixel (PNG, JPEG, GIF, BMP, TIFF, PPM; 10 for progressive JPEG), 13 for AVIF, 17
for WebP, 25 for JPEG 2000, whose libraries hold copies of their own. So 0.6 to 0.8 GB for the
largest picture, and 2 GB for a JPEG 2000."""

FORMATS: dict[str, str] = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}
"""Formats that are decoded, and the extension of each. A closed list: some of Pillow's other
formats start outside programs."""

Image.init()
_BLOCK_PIXELS = 1 << 20

# MPO is opened as JPEG; older Pillows lack AVIF. Asking for a format it lacks fails for all.
_OPENED_AS = tuple(name for name in FORMATS if name in Image.OPEN)


def decode_picture(encoded: bytes) -> NDArray[np.uint8]:
    """Decode the whole picture to RGB.

    The EXIF orientation is applied; transparency is laid over white; gray, palette, CMYK and
    16-bit gray become 8-bit RGB; of an animation the first frame is taken. Waits while the
    pictures that other threads decode leave no room below `MAX_PICTURE_PIXELS`.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: not a picture of a known format, damaged, or beyond `MAX_PICTURE_PIXELS`.
        MemoryError: there is no memory to decode it; says nothing about the picture.
    """
    with _faults("picture cannot be decoded"):
        image = _open(encoded)
        with _decoding.hold(image.width * image.height):
            image.load()
            # On the image itself: a copy would be as large as all the rest.
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)


def check_picture(encoded: bytes) -> tuple[int, int, str]:
    """Decode a picture strictly, once, when a data set is built.

    Returns:
        (height, width) after the EXIF orientation, and the extension of its format.

    Raises:
        DataError: as `decode_picture`, and where a checksum inside the file is wrong.
        MemoryError: as `decode_picture`.
    """
    height, width, _ = decode_picture(encoded).shape
    with _faults("picture is damaged"):
        image = _open(encoded)
        # Decoding passes over the checksums of PNG; this reads them and decodes nothing.
        image.verify()
        return height, width, FORMATS[str(image.format)]


def patches(
    image: NDArray[np.uint8],
    grid_h: int,
    grid_w: int,
    vision: VisionConfig,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Resize to the planned grid, normalise, and cut into patches.

    Resizing is Pillow's bicubic, which widens its filter when it reduces (antialias); a picture
    of the planned size is taken as it is. Patches come in merge blocks, block rows first and
    row-major inside each block, so that merging is a reshape. Each patch is channels first,
    (C, height, width), as the weight of a convolution flattens.

    Args:
        image: uint8 [height, width, 3].
        grid_h: patches along the height, a multiple of `spatial_merge_size`.
        grid_w: patches along the width, likewise.
        vision: patch size, merge size, mean and standard deviation.
        out: float32 [grid_h * grid_w, 3 * patch_size**2], contiguous, filled and returned if
            given.

    Returns:
        float32 [grid_h * grid_w, 3 * patch_size**2].
    """
    patch, merge = vision.patch_size, vision.spatial_merge_size
    height, width = grid_h * patch, grid_w * patch
    if image.shape[:2] != (height, width):
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    blocks = image.reshape(grid_h // merge, merge, patch, grid_w // merge, merge, patch, 3)
    # Bytes are reordered before they become floats: a quarter of the traffic.
    ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))
    flat = ordered.reshape(grid_h * grid_w, 3 * patch**2)
    deviation = np.asarray(vision.image_std, dtype=np.float64)
    scale = np.repeat(1 / (255 * deviation), patch**2).astype(np.float32)
    shift = np.repeat(np.asarray(vision.image_mean) / deviation, patch**2).astype(np.float32)
    out = np.empty(flat.shape, dtype=np.float32) if out is None else out
    np.multiply(flat, scale, out=out)
    out -= shift
    return out


class _Turns:
    """Lets threads decode side by side while their pictures are small enough together."""

    def __init__(self) -> None:
        self._pixels = 0
        self._changed = Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for a picture, and keep it for the block."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._pixels or self._pixels + pixels <= MAX_PICTURE_PIXELS
            )
            self._pixels += pixels
        try:
            yield
        finally:
            with self._changed:
                self._pixels -= pixels
                self._changed.notify_all()


_decoding = _Turns()


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Whatever Pillow raises as one DataError, but for want of memory."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(str(error))) from error
    except UnidentifiedImageError as error:  # its own words hold an address
        known = ", ".join(_OPENED_AS)
        raise DataError(f"{what}: its beginning is that of no known format ({known})") from error
    except Exception as error:  # Pillow's plugins raise of every kind on damaged files
        raise DataError(f"{what} ({type(error).__name__}: {error})") from error


def _open(encoded: bytes) -> Image.Image:
    image = Image.open(BytesIO(encoded), formats=_OPENED_AS)
    if image.width * image.height > MAX_PICTURE_PIXELS:
        raise DataError(_too_large(f"{image.width}x{image.height}"))
    return image


def _too_large(detail: str) -> str:
    return f"picture decodes to more than {MAX_PICTURE_PIXELS} pixels ({detail}); reduce it first"


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], converted in bands, so that no second picture is ever held."""
    if image.mode in ("F", "LAB"):
        raise DataError(f"picture of mode {image.mode} has no agreed RGB; convert it first")
    out = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _BLOCK_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        out[top:bottom] = _band_to_rgb(image.crop((0, top, image.width, bottom)))
    return out


def _band_to_rgb(band: Image.Image) -> NDArray[np.uint8]:
    if band.mode.startswith("I"):
        band = _from_deep_gray(band)
    if band.has_transparency_data:
        band = band.convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        band = Image.alpha_composite(white, band)
    return np.asarray(band.convert("RGB"))


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """8-bit gray of 16-bit gray; Pillow's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DataError(
            "picture has integers beyond 16 bits, which have no agreed gray; convert it"
        )
    return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
