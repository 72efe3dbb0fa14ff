"""Sizes of pictures, against values worked out by hand from the published rule."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.geometry import grid, num_image_tokens, target_size, target_sizes
from megatron_vlm.errors import DataError
from tests.data.samples import VISION

pytestmark = pytest.mark.unit

PUBLISHED = VISION.model_copy(update={"min_pixels": 3136, "max_pixels": 11289600})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((280, 280), (280, 280)),  # a multiple of 28 within bounds stays
        ((56, 56), (56, 56)),  # the smallest area allowed stays
        ((3360, 3360), (3360, 3360)),  # the largest area allowed stays
        ((480, 640), (476, 644)),  # 17.14 and 22.86 merged patches
        ((1080, 1920), (1092, 1932)),  # 38.57 and 68.57
        ((42, 98), (56, 112)),  # 1.5 -> 2 and 3.5 -> 4: halves go to even
        ((70, 126), (56, 112)),  # 2.5 -> 2 and 4.5 -> 4
        ((28, 28), (56, 56)),  # doubled: area 784 is below 3136
        ((20, 30), (56, 84)),  # sqrt(3136/600) = 2.286: 45.7 -> 56, 68.6 -> 84
        ((5, 500), (28, 504)),  # a thin side is held up at one merged patch
        ((6000, 4000), (4088, 2716)),  # /1.4580: 4115.3 -> 146, 2743.5 -> 97 patches
        ((1, 200), (28, 196)),  # one patch by 7.14: already above the lower bound
        ((1, 60), (28, 448)),  # one by 2.14 is too few: sqrt(3136/60) = 7.23: 433.8 -> 448
    ],
)
def test_published_bounds(source: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*source, PUBLISHED) == expected


def test_long_thin_picture_keeps_to_the_upper_bound() -> None:
    # One patch by 100 would be the published rule's answer; 64 is the bound of these settings.
    assert target_size(14, 2800, VISION) == (28, 64 * 28)
    assert target_size(2800, 14, VISION) == (64 * 28, 28)


def test_every_size_meets_every_bound() -> None:
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, 9, (2, 5000))).astype(np.int64) + 1
    heights, widths = sides[:, sides.max(0) <= 200 * sides.min(0)]
    for vision in (PUBLISHED, VISION):
        rows, columns = target_sizes(heights, widths, vision)
        assert not (rows % 28).any()
        assert not (columns % 28).any()
        assert (rows * columns <= vision.max_pixels).all()
        assert (rows * columns >= vision.min_pixels).all()
        again = target_sizes(rows[:50], columns[:50], vision)
        np.testing.assert_array_equal(again, (rows[:50], columns[:50]))
        for i in range(0, len(heights), 400):
            single = target_size(int(heights[i]), int(widths[i]), vision)
            assert single == (rows[i], columns[i])


def test_aspect_is_kept_to_within_rounding() -> None:
    rng = np.random.default_rng(1)
    heights, widths = rng.integers(300, 6000, (2, 2000))
    rows, columns = target_sizes(heights, widths, PUBLISHED)
    stretch = (rows / heights) / (columns / widths)
    # Each side is off by less than one merged patch.
    assert (np.abs(stretch - 1) <= 28 / rows + 28 / columns).all()


@pytest.mark.parametrize(("height", "width"), [(1, 201), (402, 2), (0, 5), (5, 0)])
def test_sizes_without_a_grid_are_refused(height: int, width: int) -> None:
    with pytest.raises(DataError, match=f"{height}x{width} pixels.*200"):
        target_sizes([100, height], [100, width], PUBLISHED)


def test_grid_and_tokens() -> None:
    assert grid(56, 84, VISION) == (4, 6)
    assert num_image_tokens(4, 6, VISION) == 6
    heights, widths = np.array([28, 280]), np.array([56, 140])
    grid_h, grid_w = grid(heights, widths, VISION)
    np.testing.assert_array_equal(num_image_tokens(grid_h, grid_w, VISION), [2, 50])
