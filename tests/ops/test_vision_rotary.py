"""The 2-D rotary embedding against complex numbers, and the order of patches against a loop."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.ops.rotary import apply_rotary, vision_position_ids, vision_rotary

pytestmark = pytest.mark.unit


def test_positions_go_block_by_block() -> None:
    expected = []
    for height, width in ((2, 4), (6, 4)):
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                expected += [(top + i, left + j) for i in range(2) for j in range(2)]
    positions = vision_position_ids(torch.tensor([[2, 4], [6, 4]]), 2)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [list(pair) for pair in expected]


def test_positions_with_other_blocks_and_none() -> None:
    raster = vision_position_ids(torch.tensor([[3, 5]]), 1).tolist()
    assert raster == [[row, column] for row in range(3) for column in range(5)]
    assert vision_position_ids(torch.tensor([[3, 3]]), 3).tolist()[3:5] == [[1, 0], [1, 1]]
    assert vision_position_ids(torch.zeros(0, 2, dtype=torch.int64), 2).shape == (0, 2)


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (0, 2)])
def test_sides_that_are_no_multiple_of_a_block_are_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]}.*multiples of 2"):
        vision_position_ids(torch.tensor([grid]), 2)


@pytest.mark.parametrize(("head_dim", "base"), [(128, 1e4), (8, 100.0), (4, 1e4)])
def test_rotation_is_a_product_of_complex_numbers(head_dim: int, base: float) -> None:
    """Channel c is the real and c + head_dim / 2 the imaginary part of one number."""
    torch.manual_seed(0)
    positions = vision_position_ids(torch.tensor([[4, 6], [2, 30]]), 2)
    x = torch.randn(len(positions), 3, head_dim, dtype=torch.float64)
    quarter, half = head_dim // 4, head_dim // 2
    angles = torch.zeros(len(positions), half, dtype=torch.float64)
    for patch, (row, column) in enumerate(positions.tolist()):
        for i in range(quarter):
            angles[patch, i] = row * base ** (-2 * i / half)
            angles[patch, quarter + i] = column * base ** (-2 * i / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None]
    ours = apply_rotary(x, vision_rotary(positions, head_dim, base, torch.float64))
    torch.testing.assert_close(ours, torch.cat([turned.real, turned.imag], dim=-1))

    single = apply_rotary(x.float(), vision_rotary(positions, head_dim, base, torch.float32))
    torch.testing.assert_close(single.double(), ours, rtol=0, atol=3e-5)
    low = apply_rotary(x.bfloat16(), vision_rotary(positions, head_dim, base, torch.float32))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), ours, rtol=0, atol=4e-2)


def test_scores_depend_on_distances_alone() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64)

    def score(q_at: tuple[int, int], k_at: tuple[int, int]) -> float:
        tables = [vision_rotary(torch.tensor([at]), 32, 1e4, torch.float64) for at in (q_at, k_at)]
        return float((apply_rotary(q, tables[0]) * apply_rotary(k, tables[1])).sum())

    assert score((3, 9), (7, 2)) == pytest.approx(score((13, 29), (17, 22)), rel=1e-12)
    assert score((3, 9), (7, 2)) != pytest.approx(score((3, 9), (2, 7)), rel=1e-3)
