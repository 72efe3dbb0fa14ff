"""Forward FLOPs of the encoder, two per multiply-add."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.config.model_schema import AdapterConfig, VisionConfig


def encoder_flops(
    grid_hw: Iterable[tuple[int, int]],
    vision: VisionConfig,
    adapter: AdapterConfig,
    language_hidden_size: int,
) -> float:
    """Trunk and adapter over pictures of these patch grids: matrix products and attention."""
    patches = np.array([height * width for height, width in grid_hw], np.int64)
    return float(part_flops(patches, patches, vision, adapter, language_hidden_size).sum())


def part_flops(
    patches: NDArray[np.int64],
    keys: NDArray[np.int64],
    vision: VisionConfig,
    adapter: AdapterConfig,
    language_hidden_size: int,
) -> NDArray[np.float64]:
    """What each of several parts of pictures costs the rank that encodes it.

    Args:
        patches: int64 [parts], of each part.
        keys: int64 [parts], patches of its picture; the same for one that is whole.
        vision: the trunk.
        adapter: what follows it.
        language_hidden_size: width of the adapter's output.

    Returns:
        float64 [parts]. The parts of a picture add up to the picture.
    """
    per_patch, per_pair = flops_terms(vision, adapter, language_hidden_size)
    # Before they are multiplied: pairs of patches alone may exceed an integer.
    own, whole = patches.astype(np.float64), keys.astype(np.float64)
    return own * (per_patch + per_pair * whole)


def flops_terms(
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
