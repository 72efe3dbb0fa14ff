"""Positions in three dimensions, against transformers' Qwen2-VL and counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vlm.data.positions import multimodal_positions, segment_positions

pytestmark = pytest.mark.unit


def _theirs(tokens: int, spans: list[tuple[int, int, int]]) -> np.ndarray:
    """Positions of one segment; `spans` are (start, rows, columns) of pictures."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace()))
    model.config.vision_config.spatial_merge_size = 2
    model.get_vision_position_ids = Qwen2VLModel.get_vision_position_ids.__get__(model)
    kinds = torch.zeros(1, tokens, dtype=torch.int64)
    for start, rows, columns in spans:
        kinds[0, start : start + rows * columns] = 1
    grids = torch.tensor([(1, 2 * rows, 2 * columns) for _, rows, columns in spans]).reshape(-1, 3)
    found, _ = Qwen2VLModel.get_rope_index(model, kinds, kinds, grids)
    return found[:, 0].numpy()


def test_as_qwen2_vl() -> None:
    """Random segments with none to several pictures, each alone in theirs."""
    rng = np.random.default_rng(3)
    with_pictures = 0
    for _ in range(20):
        bounds, spans, columns, expected = [0], [], [], []
        for _ in range(int(rng.integers(1, 6))):
            place, inside = 0, []
            for _ in range(int(rng.integers(0, 4))):
                # Two neighbouring pictures would be one to theirs.
                place += int(rng.integers(1 if inside else 0, 5))
                rows, width = (int(n) for n in rng.integers(1, 6, 2))
                inside.append((place, rows, width))
                spans.append((bounds[-1] + place, rows * width))
                columns.append(width)
                place += rows * width
            with_pictures += bool(inside)
            length = max(place + int(rng.integers(0, 7)), 1)
            expected.append(_theirs(length, inside))
            bounds.append(bounds[-1] + length)
        found = multimodal_positions(
            np.array(bounds, np.int32),
            np.array(spans, np.int64).reshape(-1, 2),
            np.array(columns, np.int64),
        )
        assert found.tolist() == np.concatenate(expected, axis=1).tolist()
    assert with_pictures > 20


def test_neighbouring_pictures_and_bounds() -> None:
    """Two pictures without text between them, one at the end of a segment, and one at the end of
    everything."""
    found = multimodal_positions(
        np.array([0, 8, 11], np.int32),
        np.array([[1, 4], [5, 3], [9, 2]]),
        np.array([2, 3, 1]),
    )
    assert found.tolist() == [
        [0, 1, 1, 1, 1, 3, 3, 3, 0, 1, 1],
        [0, 1, 1, 2, 2, 3, 3, 3, 0, 1, 2],
        [0, 1, 2, 1, 2, 3, 4, 5, 0, 1, 1],
    ]


def test_text_alone() -> None:
    bounds = np.array([0, 3, 3, 5], np.int32)
    assert segment_positions(bounds).tolist() == [0, 1, 2, 0, 1]
    none = np.zeros((0, 2), np.int64)
    assert multimodal_positions(bounds, none, none[:, 0]).tolist() == [[0, 1, 2, 0, 1]] * 3
