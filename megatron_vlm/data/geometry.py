"""From a picture's size to its grid of patches and its number of language tokens.

The rule is that of dots.ocr's published preprocessing: keep the aspect, round both sides to whole
merged patches, keep the pixel count within bounds. Pure arithmetic on sizes; no pixel is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig

MAX_ASPECT_RATIO = 200
"""Longer side over shorter side of the flattest picture taken. dots.ocr: 200."""

Sizes = TypeVar("Sizes", int, NDArray[np.int64])


class PictureRule(Protocol):
    """What decides the size that a picture is resized to; a `VisionConfig` is one."""

    @property
    def patch_size(self) -> int:
        """Pixels on a patch's side."""

    @property
    def spatial_merge_size(self) -> int:
        """Patches on a side merged into one language token."""

    @property
    def min_pixels(self) -> int:
        """Smaller pictures are enlarged to this many pixels."""

    @property
    def max_pixels(self) -> int:
        """Larger pictures are reduced to this many pixels."""


def target_sizes(
    heights: ArrayLike,
    widths: ArrayLike,
    vision: PictureRule,
    max_tokens: ArrayLike = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sizes in pixels that pictures are resized to.

    Both sides are multiples of `patch_size * spatial_merge_size`. The pixel count is at most
    `max_pixels`, always, and at least `min_pixels` unless no size near the aspect lies between
    the two bounds. A size that already meets all this is returned as it is.

    Args:
        heights: source heights in pixels, [n].
        widths: source widths in pixels, [n].
        vision: the encoder's patch size and pixel bounds.
        max_tokens: language tokens that each may have at most, [n] or one for all; it lowers both
            bounds where it is tighter. 0: only the encoder's bounds.

    Returns:
        Two int64 arrays [n].

    Raises:
        DataError: a side is below 1, or an aspect ratio exceeds 200.
    """
    height = np.asarray(heights, dtype=np.float64)
    width = np.asarray(widths, dtype=np.float64)
    check_sizes(height, width)
    unit = vision.patch_size * vision.spatial_merge_size
    caps = np.asarray(max_tokens, dtype=np.int64)
    capped = np.minimum(caps * unit**2, vision.max_pixels)
    max_pixels = np.where(caps > 0, capped, vision.max_pixels)
    min_pixels = np.minimum(vision.min_pixels, max_pixels)
    most = max_pixels // unit**2
    least = -(-min_pixels // unit**2)

    # Counted in merged patches, so that products are exact.
    rows = np.maximum(1.0, np.rint(height / unit))
    columns = np.maximum(1.0, np.rint(width / unit))
    small = rows * columns < least
    enlarge = np.sqrt(min_pixels / (height * width))
    rows = np.where(small, np.ceil(height * enlarge / unit), rows)
    columns = np.where(small, np.ceil(width * enlarge / unit), columns)

    large = rows * columns > most
    reduce = np.sqrt((height * width) / max_pixels)
    rows = np.where(large, np.maximum(1.0, np.floor(height / reduce / unit)), rows)
    columns = np.where(large, np.maximum(1.0, np.floor(width / reduce / unit)), columns)
    # A side held up at one merged patch leaves the other too long for the bound.
    rows, columns = (
        np.where(rows > columns, np.minimum(rows, most // columns), rows),
        np.where(columns >= rows, np.minimum(columns, most // rows), columns),
    )
    return (rows * unit).astype(np.int64), (columns * unit).astype(np.int64)


def target_size(height: int, width: int, vision: PictureRule) -> tuple[int, int]:
    """(height, width) in pixels that one picture is resized to; see `target_sizes`."""
    rows, columns = target_sizes([height], [width], vision)
    return int(rows[0]), int(columns[0])


def check_sizes(heights: ArrayLike, widths: ArrayLike) -> None:
    """Refuse sizes that have no grid.

    Raises:
        DataError: a side is below 1, or an aspect ratio exceeds 200; names the first such size.
    """
    height = np.atleast_1d(np.asarray(heights, dtype=np.float64))
    width = np.atleast_1d(np.asarray(widths, dtype=np.float64))
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    bad = np.flatnonzero((shorter < 1) | (longer > MAX_ASPECT_RATIO * shorter))
    if bad.size:
        first = int(bad[0])
        raise DataError(
            f"picture of {height[first]:.0f}x{width[first]:.0f} pixels (height x width): expected "
            f"sides of at least 1 and at most {MAX_ASPECT_RATIO} times each other; crop it or "
            "leave it out"
        )


def grid(height: Sizes, width: Sizes, vision: VisionConfig) -> tuple[Sizes, Sizes]:
    """Patches along each side, (grid_h, grid_w), of sizes given by `target_size(s)`."""
    return height // vision.patch_size, width // vision.patch_size


def num_image_tokens(grid_h: Sizes, grid_w: Sizes, vision: VisionConfig) -> Sizes:
    """Language tokens of grids of patches: one for each `spatial_merge_size` squared patches."""
    return grid_h * grid_w // vision.spatial_merge_size**2
