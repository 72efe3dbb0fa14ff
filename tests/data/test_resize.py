"""Resizing against Pillow's own, and turning against Pillow's transpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.data.resize import resize, resize_tensor

pytestmark = pytest.mark.unit

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SIZES = {
    "reduced": ((160, 256), (84, 140)),
    "much_reduced": ((900, 1100), (28, 28)),
    "enlarged": ((28, 28), (308, 420)),
    "one_up_one_down": ((57, 200), (84, 56)),
    "nearly_same": ((300, 300), (308, 308)),
    "one_side_same": ((28, 40), (28, 56)),
    "same": ((28, 56), (28, 56)),
    "pixel": ((1, 1), (56, 56)),
    "line": ((1, 200), (28, 784)),
    "flat": ((40, 5000), (28, 3500)),
    "flat_mixed": ((20, 2020), (28, 1400)),
    "enlarged_and_flat": ((20, 2020), (28, 2828)),
    "tall": ((5000, 40), (3500, 28)),  # Pillow reduces the height first
    "tall_enlarged": ((2020, 20), (2828, 28)),
    "tall_mixed": ((2020, 20), (1400, 28)),
    "height_just_first": ((341, 364), (140, 264)),  # 201 rows less, 100 columns
    "width_just_first": ((340, 364), (140, 264)),
}


def extreme(height: int, width: int) -> np.ndarray:
    """Black and white noise: filters overshoot at every pixel."""
    rng = np.random.default_rng([height, width])
    return rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * np.uint8(255)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_against_pillow(sizes: tuple[tuple[int, int], tuple[int, int]], orientation: int) -> None:
    (rows, columns), (height, width) = sizes
    image = extreme(columns, rows) if orientation >= 5 else extreme(rows, columns)
    turn = TURNS[orientation]
    upright = Image.fromarray(image)
    if turn is not None:
        upright = upright.transpose(turn)
    resized = upright.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(resized).astype(int)
    for result in (
        resize(image, height, width, orientation),
        resize_tensor(torch.from_numpy(image), height, width, orientation).numpy(),
    ):
        assert result.dtype == np.uint8
        assert result.shape == (height, width, 3)
        assert np.abs(result - expected).max() <= 2
        # Two levels are the exception.
        assert np.abs(result - expected).mean() < 0.05


def test_size_that_is_right_is_not_resampled() -> None:
    image = extreme(28, 56)
    np.testing.assert_array_equal(resize(image, 28, 56), image)
    np.testing.assert_array_equal(resize(image, 56, 28, 8), np.rot90(image))
