"""Real photographs that come with the packages of the tests."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megatron_vlm.data.decoders import PatchJob
from megatron_vlm.data.geometry import grid, target_size
from tests.data.samples import VISION

_PLACES = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "text": ("skimage", "data/text.png"),
}

NAMES = tuple(_PLACES)


@lru_cache
def photograph(name: str) -> bytes:
    """One of `NAMES`, as it is in the package."""
    package, path = _PLACES[name]
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / path).read_bytes()


def job_of(encoded: bytes, height: int, width: int) -> PatchJob:
    """The job that a data set with `VISION` would make of it."""
    return PatchJob(encoded, height, width, *grid(*target_size(height, width, VISION), VISION))


def upright_rgb(image: Image.Image) -> Image.Image:
    """By Pillow alone: turned as EXIF says, over white, 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image) / 257.0).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def levels(patches: np.ndarray, grid_h: int, grid_w: int) -> np.ndarray:
    """The picture that patches were cut from, float64 [height, width, 3] in 0 to 255."""
    out = np.empty((grid_h * 14, grid_w * 14, 3))
    rows = iter(np.asarray(patches, dtype=np.float64))
    for block_y in range(0, grid_h, 2):
        for block_x in range(0, grid_w, 2):
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                top, left = (block_y + y) * 14, (block_x + x) * 14
                pixels = next(rows).reshape(3, 14, 14).transpose(1, 2, 0)
                pixels = (pixels * VISION.image_std + VISION.image_mean) * 255
                out[top : top + 14, left : left + 14] = pixels
    assert next(rows, None) is None
    return out


def by_pillow(job: PatchJob, image: Image.Image) -> np.ndarray:
    """The resized picture as `levels` gives it, by Pillow's decode and its bicubic."""
    size = (job.grid_w * 14, job.grid_h * 14)
    return np.asarray(upright_rgb(image).resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
