"""When features travel, and which activations are kept, changes nothing either."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.planning.vision_limits import encoder_patches
from tests.nano_data import build_nano_data
from tests.parallel.layouts import LAYOUTS
from tests.training_case import differences, recipe, train_case

pytestmark = pytest.mark.distributed

FLOAT64 = 1e-11
SLOW = pytest.mark.slow

GIB = 2**30
HIDDEN, ROW, ELEMENT = 64, 128, 8
TWO_MICRO_BATCHES = 2 * ROW * HIDDEN * ELEMENT / GIB
"""The least memory for features that a row a micro-batch needs."""
ONE = "vision_parallel.exchange_window=1"
TIGHT = "vision_parallel.activation_memory_gib=TWO_PICTURES"
TWO = "vision_parallel.exchange_window=2"
FEATURES = f"vision_parallel.feature_memory_gib={TWO_MICRO_BATCHES}"
ROWS, MANY_ROWS = (f"training.global_batch_size={count}" for count in (8, 16))

CASES = {
    # name: layout, overrides, windows of a step, whether some are encoded again
    "of_one": ("pp4", [ONE, ROWS], 8, False),
    "of_one_interleaved": ("pp2_vpp2_ep2_overlap", [ONE, ROWS], 4, False),
    "of_one_cp2_mbs2": ("dp2_pp2_mbs2_cp2", [ONE, ROWS], 2, False),
    "of_one_mbs4": ("dp2", [ONE, "training.micro_batch_size=4", MANY_ROWS], 2, False),
    "of_two": ("pp2_cp2_ep2", [TWO, ROWS], 2, False),
    "of_two_sp": ("tp2_pp2_ep2", [TWO, ROWS], 2, False),
    "by_memory": ("dp2", [FEATURES, MANY_ROWS], None, False),
    "encoded_again": ("dp4", [TIGHT, ROWS], 1, True),
    "encoded_again_of_one": ("pp4", [TIGHT, ONE, ROWS, "recompute.vision=full"], 8, True),
    "frozen": ("pp3_uneven", [ONE, "training.freeze=[vision,adapter]"], 4, False),
    "reduced_late": ("dp2", [ONE, ROWS, "optimizer.overlap_grad_reduce=true"], 4, False),
}
QUICK = {"of_one", "of_one_interleaved", "by_memory", "encoded_again", "reduced_late"}
SAME = ("training.freeze", "training.global_batch_size", "model.vision.max_pixels")
"""Settings that change what is learned, not how."""


@pytest.fixture(scope="module")
def nano_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in every row."""
    return build_nano_data(tmp_path_factory.mktemp("nano"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [SLOW]) for n in CASES]
)
def test_equals_one_process(name: str, nano_data: Path, tmp_path: Path) -> None:
    layout, words, windows, again = CASES[name]
    world_size, overrides, *_ = LAYOUTS[layout]
    if again:
        # Small ones, so that a rank encodes more than two.
        words = [*words, "model.vision.max_pixels=6272"]
        least = str(_two_pictures(nano_data, tmp_path, words))
        words = [word.replace("TWO_PICTURES", least) for word in words]
    one = train_case(recipe(nano_data, tmp_path / "one", *(w for w in words if w.startswith(SAME))))
    cost = tmp_path / "cost.json"
    cost.write_text('{"per_picture": 0, "per_patch": 1, "per_pair": 0.01, "per_shared_patch": 0}')
    words = [*words, f"vision_parallel.cost={cost}"]
    run = train_case(recipe(nano_data, tmp_path / "run", *overrides, *words), world_size)
    counts = {count for rank in run.passes for count, _ in rank}
    assert counts == {windows} if windows else max(counts) > 1
    # The activations of some chunks are let go of, those of others are kept.
    kept = {keep for rank in run.passes for _, chunks in rank for keep in chunks}
    assert kept == ({True, False} if again else {True})
    found = differences(run, one)
    assert len(run.losses) == 10
    assert max(found.values()) < FLOAT64, found


def _two_pictures(data: Path, folder: Path, words: list[str]) -> float:
    """GiB that the activations of two of the largest pictures take, found by asking for more."""
    words = [w for w in words if "TWO_PICTURES" not in w]
    plenty = recipe(data, folder / "asked", *words, "vision_parallel.activation_memory_gib=1000")
    patches = encoder_patches(plenty, "cpu")
    assert patches is not None
    # Thirty-two patches each.
    return 1000 / patches * 64 * 1.001
