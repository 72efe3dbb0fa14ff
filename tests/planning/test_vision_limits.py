"""What memory for the encoder comes to, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.errors import ConfigError
from megatron_vlm.planning.activations import encoder_bytes
from megatron_vlm.planning.memory import Assumptions, memory_of_stage
from megatron_vlm.planning.vision_limits import encoder_patches, window_features
from megatron_vlm.topology.layout import resolve_layout

pytestmark = pytest.mark.unit

GIB = 2**30
RECIPE = Path(__file__).parents[1] / "nano.yaml"


def recipe(*overrides: str) -> RunConfig:
    return load_recipe(str(RECIPE), ["data.train=nowhere", *overrides])


def test_activations_of_as_many_patches_fit_and_of_no_more() -> None:
    config = recipe("vision_parallel.activation_memory_gib=0.02")
    patches = encoder_patches(config, "cpu")
    assert patches is not None

    def held(count: int) -> float:
        saved = encoder_bytes(config.model, count, 8, config.recompute, "cpu")
        return saved.kept + saved.recomputed

    assert held(patches) <= 0.02 * GIB < held(patches + 1)
    # What is not kept costs less.
    full = encoder_patches(recipe("vision_parallel.activation_memory_gib=0.02",
                                  "recompute.vision=full"), "cpu")  # fmt: skip
    assert full is not None and full > patches
    assert encoder_patches(recipe(), "cpu") is None


def test_two_of_the_largest_pictures_must_fit() -> None:
    config = recipe("vision_parallel.activation_memory_gib=0.001")
    with pytest.raises(ConfigError, match=r"activation_memory_gib 0.001: two pictures of .*256 p"):
        encoder_patches(config, "cpu")
    encoder_patches(recipe("vision_parallel.activation_memory_gib=0.001",
                           "model.vision.max_pixels=3136"), "cpu")  # fmt: skip


def test_two_micro_batches_of_features_must_fit() -> None:
    # Rows of 128 tokens, 64 channels in float64.
    two = 2 * 128 * 64 * 8 / GIB
    config = recipe(f"vision_parallel.feature_memory_gib={two}")
    assert window_features(config, resolve_layout(config, 1)) == 128
    short = recipe(f"vision_parallel.feature_memory_gib={two * 0.99}")
    with pytest.raises(ConfigError, match=r"feature_memory_gib .*micro-batches of 128 tokens"):
        window_features(short, resolve_layout(short, 1))
    halves = recipe(
        f"vision_parallel.feature_memory_gib={two * 0.99}", "parallel.context_parallel_size=2"
    )
    assert window_features(halves, resolve_layout(halves, 2)) == 126


def test_the_memory_plan_knows_both_bounds() -> None:
    words = ["training.global_batch_size=32", "parallel.pipeline_model_parallel_size=2"]
    free = recipe(*words)
    layout = resolve_layout(free, 2)
    assumptions = Assumptions(picture_tokens=128, device="cpu")
    plain = memory_of_stage(free, layout, 0, assumptions)
    bounded = recipe(*words, "vision_parallel.exchange_window=1",
                     "vision_parallel.activation_memory_gib=0.02")  # fmt: skip
    less = memory_of_stage(bounded, layout, 0, assumptions)
    assert less.encoder <= 0.02 * GIB < plain.encoder
    # Own: half of the step's. Then all 32 rows with gradients, or two in flight and two to come.
    feature = 64 * 8
    assert plain.features == (16 + 2 * 32) * 128 * feature
    assert less.features == (16 + 2 * 2 + 2) * 128 * feature
    assert replace(less, encoder=plain.encoder, features=plain.features) == plain
