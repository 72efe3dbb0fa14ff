"""Steps that are hard to share out: uneven ones, a long video, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config import RunConfig
from megatron_vlm.data.build import build_dataset
from megatron_vlm.errors import PlanError
from megatron_vlm.platform import World
from tests.data.videos import video
from tests.parallel.layouts import LAYOUTS
from tests.ranks import run_ranks
from tests.training_case import RECIPE, differences, recipe, train_case

pytestmark = pytest.mark.distributed

FLOAT64 = 1e-11
HUGE, SMALL = (784, 672), (56, 84)
"""Pixels: 2,688 patches and 24."""


def _built(folder: Path, entries: list[dict[str, Any]], **options: Any) -> Path:
    """A set that is both trained on and held out."""
    file = folder / "samples.json"
    file.write_text(json.dumps(entries))
    for name in ("train", "held_out"):
        build_dataset(file, folder / name, workers=1, **options)
    return folder


def _said(pictures: int, letters: int) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": "<image>" * pictures + "?"},
        {"from": "gpt", "value": "ab" * (letters // 2)},
    ]


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three samples one has a huge picture, one two small ones, one fills a row with text."""
    folder, rng = tmp_path_factory.mktemp("uneven"), np.random.default_rng(0)
    for name, (height, width) in {"huge": HUGE, "small": SMALL}.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    kinds = [
        {"conversations": _said(1, 40), "images": ["huge.png"]},
        {"conversations": _said(2, 60), "images": ["small.png", "small.png"]},
        {"conversations": _said(0, 740)},
    ]
    return _built(folder, [{"id": str(n), **kinds[n % 3]} for n in range(24)])


@pytest.mark.parametrize(
    "name",
    [
        "dp4",
        pytest.param("pp4", marks=pytest.mark.slow),
        pytest.param("pp2_cp2_ep2", marks=pytest.mark.slow),
    ],
)
def test_one_huge_picture_among_small_ones_and_text(
    name: str, uneven_data: Path, tmp_path: Path
) -> None:
    words = (
        "training.train_iters=2",
        "training.seq_length=768",
        f"model.vision.max_pixels={HUGE[0] * HUGE[1]}",
        "data.shuffle=false",
    )
    layout, cost = LAYOUTS[name], tmp_path / "cost.json"
    # So small a model is never worth the messages; here they cost nothing.
    cost.write_text('{"per_picture": 0, "per_patch": 1, "per_pair": 0.01, "per_shared_patch": 0}')
    words = (*words, f"vision_parallel.cost={cost}")
    one = train_case(recipe(uneven_data, tmp_path / "one", *words))
    run = train_case(
        recipe(uneven_data, tmp_path / "run", *layout.overrides, *words), layout.world_size
    )
    assert sum(one.bare) > 0, "no micro-batch was without pictures"
    # Whole pictures would be near the number of ranks; the huge one is shared.
    assert max(max(step) for step in run.shares) > 1
    assert all(entry["vision_imbalance"] < 2 for entry in run.metrics)
    found = differences(run, one)
    assert max(found.values()) < FLOAT64, found


FRAMES, FRAME_TOKENS = 125, 640
VIDEO = (
    "training.train_iters=1",
    "optimizer.lr_warmup_iters=0",
    "training.seq_length=82944",
    "training.global_batch_size=1",
    "training.precision=fp32",
    "model.language.num_layers=1",
    "model.language.first_k_dense_replace=0",
    "model.language.max_position_embeddings=82944",
    "model.vision.max_pixels=501760",
    "parallel.tensor_model_parallel_size=4",
    "parallel.sequence_parallel=true",
)


@pytest.fixture(scope="module")
def video_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes of one frame a second, 640 tokens each."""
    folder = tmp_path_factory.mktemp("video")
    # 32 by 20 blocks of 28 pixels.
    (folder / "long.mp4").write_bytes(video(frames=FRAMES, fps=1, size=(896, 560)))
    turns = [
        {"from": "human", "value": "<video>what is it?"},
        {"from": "gpt", "value": "a film"},
    ]
    entries = [{"id": str(n), "conversations": turns, "videos": ["long.mp4"]} for n in range(2)]
    return _built(folder, entries, video_max_tokens=FRAMES * FRAME_TOKENS)


@pytest.mark.slow
def test_a_video_of_80_000_tokens(video_data: Path, tmp_path: Path) -> None:
    run = train_case(recipe(video_data, tmp_path / "run", *VIDEO), 4)
    (step,) = run.metrics
    assert step["images"] == FRAMES
    assert step["image_patches"] == FRAMES * FRAME_TOKENS * 4
    assert np.isfinite(step["lm_loss"]) and np.isfinite(step["grad_norm"])
    # Frames are as good as pictures: 125 of one size on four ranks.
    assert step["vision_imbalance"] == pytest.approx(32 / (125 / 4), rel=0.02)


def test_a_video_that_does_not_fit_is_refused_on_every_rank(
    video_data: Path, tmp_path: Path
) -> None:
    words = (*VIDEO, "vision_parallel.device_memory_gib=0.6")
    told = run_ranks(4, _refused, recipe(video_data, tmp_path / "run", *words))
    assert len(set(told)) == 1, told
    assert told[0].startswith("step 1 does not fit: rank ")
    assert " GiB of the 0.6 of its device" in told[0]
    assert "(the largest has 2,560)" in told[0]
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def _refused(world: World, config: RunConfig) -> str:
    from megatron_vlm.training.loop import train

    with pytest.raises(PlanError) as caught:
        train(config, world)
    return str(caught.value)


def test_the_command_says_so_and_exits_with_2(uneven_data: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "megatron_vlm", "train", str(RECIPE)),
        f"data.train={uneven_data / 'train'}",
        f"run_dir={tmp_path / 'run'}",
        "training.seq_length=768",
        f"model.vision.max_pixels={HUGE[0] * HUGE[1]}",
        "vision_parallel.device_memory_gib=0.05",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "step 1 does not fit: rank 0 would hold" in done.stderr
    assert "Traceback" not in done.stderr
