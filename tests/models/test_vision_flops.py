"""The encoder's FLOPs by formula against a count of what torch really multiplies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_vlm.config import AdapterConfig, VisionConfig
from megatron_vlm.models.vision.encoder import VisionEncoder
from megatron_vlm.models.vision.flops import encoder_flops, part_flops

pytestmark = pytest.mark.unit

VISION = VisionConfig(num_layers=3, hidden_size=64, num_attention_heads=4, ffn_hidden_size=96)
LANGUAGE = 80
ADAPTER = AdapterConfig()
SEED = VISION.model_copy(update={"gated_linear_unit": False, "qk_layernorm": True})
OPTIONS = {
    "dots": (VISION, ADAPTER),
    "seed": (SEED, AdapterConfig(merge="average")),
    "average_wide": (VISION, AdapterConfig(merge="average", hidden_size=112)),
    "narrow": (VISION, AdapterConfig(hidden_size=48)),
}


def _attention(q: list[int], k: list[int], v: list[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    # Short pictures of several sizes would be padded together, and the padding counted.
    "grids",
    [[(4, 6)], [(2, 8), (4, 4), (8, 2)], [(12, 16), (10, 20), (16, 14)]],
)
def test_equals_what_torch_counts(grids: list[tuple[int, int]], option: str) -> None:
    vision, adapter = OPTIONS[option]
    encoder = VisionEncoder(vision, adapter, LANGUAGE)
    patches = sum(height * width for height, width in grids)
    # torch has formulas for the fused attention of GPUs alone.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={attention: _attention})
    with torch.no_grad(), counter:
        encoder(torch.zeros(patches, 588), torch.tensor(grids))
    assert "aten._scaled_dot_product_flash_attention_for_cpu" in {
        str(name) for name in counter.get_flop_counts()["Global"]
    }
    assert encoder_flops(grids, vision, adapter, LANGUAGE) == counter.get_total_flops()


def test_pictures_add_up_and_none_costs_nothing() -> None:
    grids = [(2, 4), (30, 12), (64, 64)]
    parts = [encoder_flops([grid], VISION, ADAPTER, LANGUAGE) for grid in grids]
    assert encoder_flops(grids, VISION, ADAPTER, LANGUAGE) == pytest.approx(sum(parts), rel=1e-15)
    assert encoder_flops([], VISION, ADAPTER, LANGUAGE) == 0


def test_parts_cost_their_queries_over_all_keys() -> None:
    """A part against a picture of its size, and torch's count for the keys that it has besides."""
    own, whole = 40, 192
    found = part_flops(
        np.array([own, whole - own]), np.array([whole] * 2), VISION, ADAPTER, LANGUAGE
    )
    assert found.sum() == encoder_flops([(12, 16)], VISION, ADAPTER, LANGUAGE)
    alone = encoder_flops([(2, own // 2)], VISION, ADAPTER, LANGUAGE)
    more = sdpa_flop_count((1, 4, own, 16), (1, 4, whole, 16), (1, 4, whole, 16))
    less = sdpa_flop_count((1, 4, own, 16), (1, 4, own, 16), (1, 4, own, 16))
    assert found[0] == alone + VISION.num_layers * (more - less)


def test_published_encoder_on_its_largest_picture() -> None:
    """57,600 patches of dots.ocr's largest picture: attention outweighs all weights."""
    vision = VisionConfig(
        num_layers=42, hidden_size=1536, num_attention_heads=12, ffn_hidden_size=4224
    )
    linear = 2 * 57_600 * (42 * (4 * 1536**2 + 3 * 1536 * 4224) + 588 * 1536)
    adapter = 2 * 14_400 * (6144 * 6144 + 6144 * 7168)
    attention = 42 * 12 * 2 * (2 * 57_600 * 57_600 * 128)
    assert encoder_flops([(240, 240)], vision, ADAPTER, 7168) == linear + adapter + attention
    assert attention > linear + adapter
