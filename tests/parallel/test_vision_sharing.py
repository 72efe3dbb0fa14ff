"""Who encodes a picture, and how many share it, changes nothing: losses, norms, parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.nano_data import build_sparse_data
from tests.parallel.layouts import LAYOUTS
from tests.training_case import differences, recipe, train_case

pytestmark = pytest.mark.distributed

# As in the table of layouts; there pictures are shared as the balance finds it best.
FLOAT64 = 1e-11
SLOW = pytest.mark.slow

CASES = {
    # name: layout, overrides, most ranks that share a picture
    "whole": ("dp4", ["vision_parallel.max_parts=1"], 1),
    "in_turn": ("dp4", ["vision_parallel.balance=round_robin"], 1),
    "two": ("dp4", ["vision_parallel.max_parts=2"], 2),
    "four_differencing": ("dp4", ["vision_parallel.balance=karmarkar_karp"], 4),
    "groups_of_two_replicas": ("dp4", ["vision_parallel.balance_group_size=2"], 2),
    "cp2_mbs2": ("cp2", ["training.micro_batch_size=2"], 2),
    "mbs4": ("dp2", ["training.micro_batch_size=4", "training.global_batch_size=8"], 2),
    "recomputed": ("pp4", ["recompute.vision=full"], 4),
    "recomputed_in_part": ("tp2_pp2_ep2", ["recompute.vision=selective"], 4),
    "first_stage": ("tp2_pp2_ep2", ["vision_parallel.placement=first_stage"], 2),
    "first_stage_whole": (
        "pp4",
        ["vision_parallel.placement=first_stage", "vision_parallel.exchange_window=1"],
        1,
    ),
    "frozen": ("pp3_uneven", ["training.freeze=[vision]"], 3),
    "frozen_adapter_too": ("dp4", ["training.freeze=[vision,adapter]"], 4),
}
QUICK = {"two", "first_stage_whole", "cp2_mbs2", "recomputed", "frozen", "mbs4"}


@pytest.fixture(scope="module")
def sparse_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few pictures: one alone in a step, and steps without any."""
    return build_sparse_data(tmp_path_factory.mktemp("sparse"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [SLOW]) for n in CASES]
)
def test_equals_one_process(name: str, sparse_data: Path, tmp_path: Path) -> None:
    layout, words, shared = CASES[name]
    world_size, overrides, *_ = LAYOUTS[layout]
    # What changes what is learned, not how: of the batch and what is frozen.
    same = [w for w in words if w.startswith(("training.freeze", "training.global_batch_size"))]
    one = train_case(recipe(sparse_data, tmp_path / "one", *same))
    # So small a model is never worth the messages; here they cost nothing.
    cost = tmp_path / "cost.json"
    cost.write_text('{"per_picture": 0, "per_patch": 1, "per_pair": 0.01, "per_shared_patch": 0}')
    words = [*words, f"vision_parallel.cost={cost}"]
    run = train_case(recipe(sparse_data, tmp_path / "run", *overrides, *words), world_size)
    counts = [count for step in run.shares for count in step]
    assert max(counts) == shared and sum(step == [] for step in run.shares) > 0
    assert {count for step in one.shares for count in step} == {1}
    found = differences(run, one)
    assert len(run.losses) == 10
    assert max(found.values()) < FLOAT64, found
