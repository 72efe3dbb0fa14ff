"""From an encoded picture to RGB pixels, and from pixels to normalised patches.

Here is the plain way, with Pillow; `decoders` has the fast ones, held to the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Condition
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_vlm.data.jpeg import check_jpeg
from megatron_vlm.data.resize import resize
from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig

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

JPEGS = ("JPEG", "MPO")
"""Names under which Pillow opens a JPEG; MPO is several in one file."""

Image.init()
_BLOCK_PIXELS = 1 << 20
_BLOCK_PATCHES = 128
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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
    with faults("picture cannot be decoded"):
        image = open_picture(encoded)
        with decoding.hold(image.width * image.height):
            return load_picture(image)


def open_picture(encoded: bytes) -> Image.Image:
    """Read the header alone; for use within `faults`.

    Raises:
        DataError: it decodes to more than `MAX_PICTURE_PIXELS`.
        Exception: whatever Pillow raises.
    """
    image = Image.open(BytesIO(encoded), formats=_OPENED_AS)
    if image.width * image.height > MAX_PICTURE_PIXELS:
        raise DataError(_too_large(f"{image.width}x{image.height}"))
    return image


def orientation_of(image: Image.Image) -> int:
    """How the stored picture is turned, as EXIF numbers it, 1 (upright) to 8. Decodes a PNG, whose
    EXIF may come after its pixels."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in _TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels once the picture is turned upright; decodes as `orientation_of`."""
    size = (image.height, image.width)
    return size[::-1] if orientation_of(image) >= 5 else size


def load_picture(image: Image.Image) -> NDArray[np.uint8]:
    """Decode an open picture; for use within `faults` and `decoding`.

    Returns:
        uint8 [height, width, 3], upright.

    Raises:
        DataError: its colours have no agreed RGB.
        Exception: whatever Pillow raises.
    """
    turn = _TURNS.get(orientation_of(image))
    image.load()
    return _to_rgb(image if turn is None else image.transpose(turn))


def check_picture(encoded: bytes) -> tuple[int, int, str]:
    """Decode a picture strictly, once, when a data set is built.

    Returns:
        (height, width) after the EXIF orientation, and the extension of its format.

    Raises:
        DataError: as `decode_picture`, where a checksum inside the file is wrong, and where a
            JPEG has damage that Pillow makes up for.
        MemoryError: as `decode_picture`.
    """
    with faults("picture cannot be decoded"):
        image = open_picture(encoded)
        with decoding.hold(image.width * image.height):
            checked = image.format in JPEGS and check_jpeg(encoded, image.height, image.width)
            if not checked:
                load_picture(image)
            height, width = upright_size(image)
    with faults("picture is damaged"):
        # Decoding passes over the checksums of PNG; this reads them and decodes nothing.
        open_picture(encoded).verify()
    return height, width, FORMATS[str(image.format)]


def patches(
    image: NDArray[np.uint8],
    grid_h: int,
    grid_w: int,
    vision: VisionConfig,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Resize to the planned grid, normalise, and cut into patches.

    Resizing is bicubic and widens its filter when it reduces (antialias); a picture of the planned
    size is taken as it is. Patches are laid out as by `cut`.

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
    patch = vision.patch_size
    return cut(resize(image, grid_h * patch, grid_w * patch), vision, out)


def cut(
    image: NDArray[np.uint8], vision: VisionConfig, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Normalise a picture of the planned size, and cut it into patches.

    Patches come in merge blocks, block rows first and row-major inside each block, so that merging
    is a reshape. Each patch is channels first, (C, height, width), as the weight of a convolution
    flattens.

    Args:
        image: uint8 [height, width, 3], both multiples of `patch_size * spatial_merge_size`.
        vision: patch size, merge size, mean and standard deviation.
        out: as of `patches`.

    Returns:
        float32 [patches, 3 * patch_size**2].
    """
    patch, merge = vision.patch_size, vision.spatial_merge_size
    grid_h, grid_w = image.shape[0] // patch, image.shape[1] // patch
    blocks = image.reshape(grid_h // merge, merge, patch, grid_w // merge, merge, patch, 3)
    # Bytes are reordered before they become floats: a quarter of the traffic.
    ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5))
    flat = ordered.reshape(grid_h * grid_w, 3 * patch**2)
    out = np.empty(flat.shape, dtype=np.float32) if out is None else out
    scale, shift = normalisation(vision)
    # In blocks that stay in the cache, by operands as large: twice as fast as one pass each.
    rows = min(_BLOCK_PATCHES, len(flat))
    scales, shifts = np.tile(scale, (rows, 1)), np.tile(shift, (rows, 1))
    for start in range(0, len(flat), rows):
        part = out[start : start + rows]
        np.copyto(part, flat[start : start + rows])
        np.multiply(part, scales[: len(part)], out=part)
        np.subtract(part, shifts[: len(part)], out=part)
    return out


def normalisation(vision: VisionConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(scale, shift), float32 [3 * patch_size**2]: a patch is its bytes * scale - shift."""
    deviation = np.asarray(vision.image_std, dtype=np.float64)
    scale = np.repeat(1 / (255 * deviation), vision.patch_size**2)
    shift = np.repeat(np.asarray(vision.image_mean) / deviation, vision.patch_size**2)
    return scale.astype(np.float32), shift.astype(np.float32)


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


decoding = _Turns()
"""Every decode of the process holds its pixels here."""


@contextmanager
def faults(what: str) -> Iterator[None]:
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
