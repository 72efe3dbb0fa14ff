"""From an encoded picture to RGB pixels, and from pixels to normalised patches.

The builder and the trainer decode with the same function, so what was accepted when a set was
built is what is trained on.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.schema import VisionConfig

MAX_PICTURE_PIXELS = 80_000_000
"""Most pixels a picture may decode to (240 MB as RGB). Our choice, below Pillow's own warning."""

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
# MPO is opened as JPEG; older Pillows lack AVIF. Asking for a format it lacks fails for all.
_OPENED_AS = tuple(name for name in FORMATS if name in Image.OPEN)


def decode_picture(encoded: bytes) -> NDArray[np.uint8]:
    """Decode the whole picture to RGB.

    The EXIF orientation is applied; transparency is laid over white; gray, palette, CMYK and
    16-bit gray become 8-bit RGB; of an animation the first frame is taken.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: not a picture of a known format, damaged, or beyond `MAX_PICTURE_PIXELS`.
    """
    try:
        image = _open(encoded)
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(str(error))) from error
    except Exception as error:  # Pillow's plugins raise of every kind on damaged files
        raise DataError(f"picture cannot be decoded ({type(error).__name__}: {error})") from error


def check_picture(encoded: bytes) -> tuple[int, int, str]:
    """Decode a picture strictly, once, when a data set is built.

    Returns:
        (height, width) after the EXIF orientation, and the extension of its format.

    Raises:
        DataError: as `decode_picture`, and where a checksum inside the file is wrong.
    """
    pixels = decode_picture(encoded)
    try:
        image = _open(encoded)
        # Decoding passes over the checksums of PNG; this reads them and decodes nothing.
        image.verify()
    except Exception as error:
        raise DataError(f"picture is damaged ({type(error).__name__}: {error})") from error
    return pixels.shape[0], pixels.shape[1], FORMATS[str(image.format)]


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


def _open(encoded: bytes) -> Image.Image:
    image = Image.open(BytesIO(encoded), formats=_OPENED_AS)
    if image.width * image.height > MAX_PICTURE_PIXELS:
        raise DataError(_too_large(f"{image.width}x{image.height}"))
    return image


def _too_large(detail: str) -> str:
    return f"picture decodes to more than {MAX_PICTURE_PIXELS} pixels ({detail}); reduce it first"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _from_deep_gray(image)
    elif image.mode in ("F", "LAB"):
        raise DataError(f"picture of mode {image.mode} has no agreed RGB; convert it first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_deep_gray(image: Image.Image) -> Image.Image:
    """8-bit gray of 16-bit gray; Pillow's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DataError(
            "picture has integers beyond 16 bits, which have no agreed gray; convert it"
        )
    return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))
