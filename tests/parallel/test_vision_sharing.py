"""Who encodes a picture, and how many share it, changes nothing: losses, norms, parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.layouts import LAYOUTS
from tests.training_case import differences, recipe, train_case

pytestmark = pytest.mark.distributed

# As in the table of layouts; there pictures are shared as the balance finds it best.
FLOAT64 = 1e-11
SLOW = pytest.mark.slow

CASES = {
    # name: layout, overrides, the numbers of ranks that share a picture in some step
    "whole": ("dp4", ["vision_parallel.max_parts=1"], {1}),
    "in_turn": ("dp4", ["vision_parallel.balance=round_robin"], {1}),
    "two": ("dp4", ["vision_parallel.max_parts=2"], {1, 2}),
    "four_differencing": ("dp4", ["vision_parallel.balance=karmarkar_karp"], {1, 2, 3, 4}),
    "groups_of_two_replicas": ("dp4", ["vision_parallel.balance_group_size=2"], {1, 2}),
    "cp2_mbs2": ("cp2", ["training.micro_batch_size=2"], {1, 2}),
    "mbs4": ("dp2", ["training.micro_batch_size=4", "training.global_batch_size=8"], {1, 2}),
    "recomputed": ("pp4", ["recompute.vision=full"], {1, 2, 3, 4}),
    "recomputed_in_part": ("tp2_pp2_ep2", ["recompute.vision=selective"], {1, 2, 3, 4}),
    "frozen": ("pp3_uneven", ["training.freeze=[vision]"], {1, 2, 3}),
    "frozen_adapter_too": ("dp4", ["training.freeze=[vision,adapter]"], {1, 2, 3, 4}),
}
QUICK = {"two", "cp2_mbs2", "recomputed", "frozen", "mbs4"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [SLOW]) for n in CASES]
)
def test_equals_one_process(name: str, nano_data: Path, tmp_path: Path) -> None:
    layout, words, shared = CASES[name]
    world_size, overrides, *_ = LAYOUTS[layout]
    # What changes what is learned, not how: of the batch and what is frozen.
    same = [w for w in words if w.startswith(("training.freeze", "training.global_batch_size"))]
    one = train_case(recipe(nano_data, tmp_path / "one", *same))
    # So small a model is never worth the messages; here they cost nothing.
    cost = tmp_path / "cost.json"
    cost.write_text('{"per_picture": 0, "per_patch": 1, "per_pair": 0.01, "per_shared_patch": 0}')
    words = [*words, f"vision_parallel.cost={cost}"]
    run = train_case(recipe(nano_data, tmp_path / "run", *overrides, *words), world_size)
    assert {count for step in run.shares for count in step} == shared
    assert {count for step in one.shares for count in step} == {1}
    found = differences(run, one)
    assert len(run.losses) == 10
    assert max(found.values()) < FLOAT64, found
