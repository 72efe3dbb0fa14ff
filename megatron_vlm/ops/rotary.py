"""2-D rotary embedding of picture patches: half of a head's channels for each axis."""

from __future__ import annotations

import torch
from torch import Tensor


def vision_position_ids(grid_hw: Tensor, merge: int) -> Tensor:
    """(row, column) of every patch, pictures one after another, in merge-block order.

    Args:
        grid_hw: int64 [pictures, 2], patches along height and width, multiples of `merge`.
        merge: patches on a side of a block; a block's patches are consecutive.

    Returns:
        int64 [patches, 2].

    Raises:
        ValueError: a picture's height or width is not a positive multiple of `merge`.
    """
    parts = []
    for height, width in grid_hw.tolist():
        if height <= 0 or width <= 0 or height % merge or width % merge:
            raise ValueError(
                f"grid_hw {height}x{width} must be positive multiples of {merge} patches; resize "
                "the picture to multiples of patch_size x spatial_merge_size pixels"
            )
        rows = torch.arange(height).view(height // merge, 1, merge, 1)
        columns = torch.arange(width).view(1, width // merge, 1, merge)
        shape = (height // merge, width // merge, merge, merge)
        pair = torch.stack([rows.expand(shape), columns.expand(shape)], dim=-1)
        parts.append(pair.reshape(-1, 2))
    if not parts:
        return torch.zeros(0, 2, dtype=torch.int64)
    return torch.cat(parts).to(grid_hw.device)


def vision_rotary(position_ids: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Cosines and sines for `apply_rotary`.

    Args:
        position_ids: int64 [patches, 2].
        head_dim: channels of a head, a multiple of 4.
        base: base of the frequencies `base ** -(2 i / (head_dim / 2))`.
        dtype: precision of the angles, float32 or float64.

    Returns:
        [2, patches, 1, head_dim]: rows' frequencies, then columns', the two repeated once.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=dtype, device=position_ids.device) / half
    angles = position_ids.to(dtype).unsqueeze(-1) * base**-exponent
    angles = angles.flatten(1)
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate `[patches, heads, head_dim]` in the precision of `rotary`; the dtype stays."""
    cosine, sine = rotary
    wide = x.to(rotary.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)
