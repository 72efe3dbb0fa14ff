"""Forward FLOPs of the encoder, two per multiply-add."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_vlm.config.model_schema import AdapterConfig, VisionConfig


def encoder_flops(
    grid_hw: Iterable[tuple[int, int]],
    vision: VisionConfig,
    adapter: AdapterConfig,
    language_hidden_size: int,
) -> float:
    """Trunk and adapter over pictures of these patch grids: matrix products and attention."""
    hidden = vision.hidden_size
    matrices = 3 if vision.gated_linear_unit else 2
    block = 4 * hidden * hidden + matrices * hidden * vision.ffn_hidden_size
    embed = vision.in_channels * vision.patch_size**2 * hidden
    merged, inner = adapter.widths(vision)
    per_patch = float(embed + vision.num_layers * block)
    per_patch += inner * (merged + language_hidden_size) / vision.spatial_merge_size**2
    total = 0.0
    for height, width in grid_hw:
        patches = height * width
        total += 2 * patches * per_patch + vision.num_layers * 4 * hidden * patches**2
    return total
