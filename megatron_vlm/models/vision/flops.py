"""Forward FLOPs of the encoder, two per multiply-add."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_vlm.config.schema import AdapterConfig, VisionConfig


def encoder_flops(
    grid_hw: Iterable[tuple[int, int]],
    vision: VisionConfig,
    adapter: AdapterConfig,
    language_hidden_size: int,
) -> float:
    """Trunk and adapter over pictures of these patch grids: matrix products and attention."""
    per_patch, per_pair = encoder_flops_terms(vision, adapter, language_hidden_size)
    total = 0.0
    for height, width in grid_hw:
        patches = height * width
        total += patches * per_patch + per_pair * patches**2
    return total


def encoder_flops_terms(
    vision: VisionConfig, adapter: AdapterConfig, language_hidden_size: int
) -> tuple[float, float]:
    """FLOPs of a patch, and of a pair of patches one of which attends to the other."""
    hidden = vision.hidden_size
    matrices = 3 if vision.gated_linear_unit else 2
    block = 4 * hidden * hidden + matrices * hidden * vision.ffn_hidden_size
    embed = vision.in_channels * vision.patch_size**2 * hidden
    merged, inner = adapter.widths(vision)
    per_patch = float(embed + vision.num_layers * block)
    per_patch += inner * (merged + language_hidden_size) / vision.spatial_merge_size**2
    return 2 * per_patch, 4.0 * vision.num_layers * hidden
