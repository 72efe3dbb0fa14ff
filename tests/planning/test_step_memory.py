"""A planned step's bytes by rank, and the refusal of one that cannot fit."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import numpy as np
import pytest

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.data.picture_table import PicturePlan, PictureTable, Shares
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.errors import PlanError
from megatron_vlm.planning.activations import encoder_bytes
from megatron_vlm.planning.memory import Assumptions, memory_of_stage
from megatron_vlm.planning.step_memory import StepMemoryModel, device_memory, share_patches
from megatron_vlm.planning.vision_limits import encoder_patches
from megatron_vlm.topology.layout import Layout, resolve_layout
from tests.engine.plans import bare_layout, random_plan
from tests.training_case import RECIPE

pytestmark = pytest.mark.unit

GIB = 2**30
PP2 = "parallel.pipeline_model_parallel_size=2"


def recipe(*overrides: str) -> RunConfig:
    return load_recipe(str(RECIPE), ["data.train=nowhere", *overrides])


def step_of(pictures: list[tuple[int, int, int]], shares: list[tuple[int, int, int]]) -> StepPlan:
    """Pictures (replica, micro-batch, tokens) and who encodes how many tokens of which."""
    table = PictureTable.of(
        [PicturePlan(0, 0, 0, 0, 2, 2 * size, dp, micro, 0, size) for dp, micro, size in pictures]
    )
    picture, rank, tokens = np.array(shares, np.int64).reshape(-1, 3).T
    base = random_plan(np.random.default_rng(0), bare_layout(dp=2), 2, 1, 24, 4, 0.0)
    return replace(
        base, pictures=table, shares=Shares(picture, rank, np.zeros_like(rank), 4 * tokens)
    )


def model_of(config: RunConfig, world_size: int = 4) -> tuple[StepMemoryModel, Layout]:
    layout = resolve_layout(config, world_size)
    return StepMemoryModel(config, layout, "cpu"), layout


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("recompute.vision=full",),
        ("vision_parallel.exchange_window=1",),
        ("training.precision=bf16", "training.freeze=[vision]"),
    ],
    ids=["plain", "recomputed", "windows", "frozen"],
)
def test_an_even_step_takes_what_a_run_is_planned_to(words: tuple[str, ...]) -> None:
    """Four rows of 16 tokens of pictures on four ranks: each encodes one of them."""
    config = recipe(PP2, *words)
    model, layout = model_of(config)
    rows = [(0, 0), (0, 1), (1, 0), (1, 1)]
    plan = step_of([(dp, m, 16) for dp, m in rows], [(i, i, 16) for i in range(4)])
    assumed = Assumptions(picture_tokens=16, device="cpu")
    expected = [
        memory_of_stage(config, layout, layout.coordinates(rank).pp, assumed).total
        for rank in range(4)
    ]
    assert model.of(plan).total == pytest.approx(expected, rel=1e-6)


def test_of_a_shared_picture_every_rank_has_all_keys() -> None:
    config = recipe(PP2)
    model, _ = model_of(config)
    plan = step_of([(0, 0, 30), (1, 0, 8)], [(0, 0, 20), (0, 3, 10), (1, 1, 8)])

    def kept(patches: int, elsewhere: int) -> float:
        saved = encoder_bytes(
            config.model, patches, 8, config.recompute, "cpu", elsewhere=float(elsewhere)
        )
        return saved.kept

    expected = [kept(80, 40), kept(32, 0), 0.0, kept(40, 80)]
    assert model.of(plan).encoder == pytest.approx(expected)
    # A third of it weighs more: the keys and values of the rest come on top.
    weights = share_patches(config, "cpu", plan)
    assert weights[2] == 32
    assert weights[:2] == pytest.approx([kept(80, 40) / kept(1, 0), kept(40, 80) / kept(1, 0)])
    assert weights[1] > 40


def test_features_lie_where_they_are_made_and_embedded() -> None:
    config = recipe(PP2)
    model, layout = model_of(config)
    plan = step_of([(0, 0, 30), (0, 1, 10), (1, 1, 8)], [(0, 3, 30), (1, 2, 10), (2, 2, 8)])
    # Ranks 0 and 1 embed for replicas 0 and 1: features and gradients, 64 channels of 8 bytes.
    assert [layout.coordinates(rank).pp for rank in range(4)] == [0, 0, 1, 1]
    assert (model.of(plan).features / (64 * 8)).tolist() == [2 * 40, 2 * 8, 18, 30]


def test_a_budget_bounds_what_is_kept() -> None:
    config = recipe(PP2, "vision_parallel.activation_memory_gib=0.02")
    model, _ = model_of(config)
    patches = encoder_patches(config, "cpu")
    assert patches is not None
    large = step_of([(0, 0, patches)], [(0, 2, patches)])
    saved = encoder_bytes(config.model, 1, 8, config.recompute, "cpu")
    pixels = 3 * 14**2 * 8 * (4 * patches - patches)
    assert model.of(large).encoder[2] == pytest.approx(patches * saved.kept + pixels)
    small = step_of([(0, 0, 4)], [(0, 2, 4)])
    assert model.of(small).encoder[2] == pytest.approx(16 * saved.kept)


def test_what_does_not_fit_is_refused_with_the_numbers_and_what_to_do() -> None:
    # The limit itself is given to the check.
    config = recipe(PP2, "vision_parallel.device_memory_gib=1")
    model, layout = model_of(config)
    pictures = [(0, 0, 64)] * 40
    plan = step_of(pictures, [(i, 2, 64) for i in range(40)])
    needed = model.of(plan)
    model.refuse_beyond(needed.total.max(), plan, 7)
    with pytest.raises(
        PlanError,
        match=r"step 7 does not fit: rank 2 would hold .* GiB of the .* of its device: .* to "
        r"encode 10,240 patches of 40 pictures \(the largest has 256\), .*activation_memory_gib=",
    ) as caught:
        model.refuse_beyond(0.6 * needed.total.max(), plan, 7)
    # What it says to set is enough.
    found = re.search(r"vision_parallel.activation_memory_gib=[\d.]+", str(caught.value))
    assert found is not None
    words = ("vision_parallel.device_memory_gib=1", found.group())
    bounded = StepMemoryModel(recipe(PP2, *words), layout, "cpu")
    bounded.refuse_beyond(0.6 * needed.total.max(), plan, 7)
    # Where nothing of that kind would do, it says what else would.
    with pytest.raises(PlanError, match=r"set recompute.vision=full, or use more ranks, or lower"):
        model.refuse_beyond(0.9 * needed.state.max(), plan, 7)
    # Of a GPU that nobody set a limit for, only what is sure is counted.
    sure = float((needed.total - needed.decoder).max())
    model_of(recipe(PP2))[0].refuse_beyond(sure, plan, 7)
    with pytest.raises(PlanError, match="step 7 does not fit"):
        model.refuse_beyond(sure, plan, 7)


def test_device_memory_is_the_settings_or_the_gpus() -> None:
    assert device_memory(recipe(), None) is None
    assert device_memory(recipe(), 5) == 5
    assert device_memory(recipe("vision_parallel.device_memory_gib=2"), 5) == 2 * GIB


def test_a_thousand_ranks_take_milliseconds() -> None:
    config = recipe("training.global_batch_size=1024")
    model, _ = model_of(config, 1024)
    pictures = [(i % 1024, 0, 1 + i % 60) for i in range(16_384)]
    plan = step_of(pictures, [(i, i % 1024, size) for i, (_, _, size) in enumerate(pictures)])
    began = time.perf_counter()
    assert len(model.of(plan).total) == 1024
    # Nothing is looked at one by one; a busy machine may take its time.
    assert time.perf_counter() - began < 1
