"""Pictures as a model sees them: from a batch's patches back to pixels, and into a page."""

from __future__ import annotations

import io
from base64 import b64encode
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_vlm.data.pictures import normalisation

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig


def painted(
    patches: NDArray[np.float32], grid_h: int, grid_w: int, vision: VisionConfig
) -> NDArray[np.uint8]:
    """The picture that patches were cut from: the inverse of `pictures.cut`, exact.

    Args:
        patches: float32 [grid_h * grid_w, 3 * patch_size**2], of a `PictureBatch`.
        grid_h: patches along the height.
        grid_w: patches along the width.
        vision: patch size, merge size, mean and standard deviation.

    Returns:
        uint8 [grid_h * patch_size, grid_w * patch_size, 3]. Black where the patches are zeros,
        which no picture has: one that could not be read.
    """
    patch, merge = vision.patch_size, vision.spatial_merge_size
    if not patches.any():
        return np.zeros((grid_h * patch, grid_w * patch, 3), np.uint8)
    scale, shift = normalisation(vision)
    bytes_ = np.clip(np.rint((patches + shift) / scale), 0, 255).astype(np.uint8)
    blocks = bytes_.reshape(grid_h // merge, grid_w // merge, merge, merge, 3, patch, patch)
    ordered = blocks.transpose(0, 2, 5, 1, 3, 6, 4)
    return ordered.reshape(grid_h * patch, grid_w * patch, 3)


def data_uri(image: NDArray[np.uint8], quality: int | None = None) -> str:
    """A picture as a `data:` address, which a page loads from itself.

    Args:
        image: uint8 [height, width, 3].
        quality: of a JPEG, 1 to 95; null: PNG, exact to the bit.
    """
    buffer = io.BytesIO()
    if quality is None:
        Image.fromarray(image).save(buffer, "PNG")
        kind = "png"
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        kind = "jpeg"
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}"
