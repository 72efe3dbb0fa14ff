"""A run that was killed goes on as if nothing had happened; also in another layout."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.parallel.layouts import LAYOUTS
from tests.training_case import Outcome, differences, recipe, train_case

FP32 = "training.precision=fp32"
# See tests/parallel/test_equality.py.
NOISE_FREE = "optimizer.adam_eps=1e-6"
DISTRIBUTED = (
    "optimizer.use_distributed_optimizer=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
    "optimizer.bucket_size=20000",
)
COSINE = ("optimizer.lr_decay_style=cosine", "optimizer.min_lr=1e-4")


def _from(run: Outcome, iteration: int) -> Outcome:
    """The part of a run after `iteration`, with its final parameters."""
    return Outcome(
        run.losses[iteration:],
        run.grad_norms[iteration:],
        run.balance[iteration:],
        run.parameters,
        run.metrics[iteration:],
    )


def _saved(run_dir: Path) -> int:
    note = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(note.read_text()) if note.exists() else 0


def _lines(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("mbs2", ()),
        ("pp2_vpp2_ep2", (*DISTRIBUTED, "checkpoint.async_save=true")),
        ("dp2", (*DISTRIBUTED, "training.precision=bf16")),
    ],
)
def test_killed_and_resumed_is_bit_identical(
    name: str, extra: tuple[str, ...], nano_data: Path, tmp_path: Path
) -> None:
    """SIGKILL of all ranks at a random step; losses, norms and parameters then match to the bit."""
    layout = LAYOUTS[name]
    words = (FP32, *COSINE, *layout.overrides, *extra)
    whole = train_case(recipe(nano_data, tmp_path / "whole", *words), layout.world_size)
    seed = int.from_bytes(os.urandom(2), "big")
    stop_at = random.Random(seed).randint(3, 8)
    cut_dir = tmp_path / "cut"
    cut = recipe(nano_data, cut_dir, *words, "checkpoint.save_interval=2")
    train_case(
        cut,
        layout.world_size,
        kill_after=lambda: _lines(cut_dir) >= stop_at and _saved(cut_dir) > 0,
    )
    iteration = _saved(cut_dir)
    assert 0 < iteration < 10, f"seed {seed}: killed after the end"
    rest = train_case(cut, layout.world_size)
    assert len(rest.losses) == 10 - iteration
    found = differences(rest, _from(whole, iteration))
    assert max(found.values()) == 0.0, f"seed {seed}, resumed at {iteration}: {found}"
    # The metrics file holds every step once, and the interrupted part again with equal values.
    entries = [json.loads(line) for line in (cut_dir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == list(range(1, 11))
    assert [entry["lm_loss"] for entry in entries] == whole.losses
    assert [entry["consumed_tokens"] for entry in entries] == [
        entry["consumed_tokens"] for entry in whole.metrics
    ]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("first", "second", "sharded"),
    [
        ("mbs2", "pp2_vpp2_ep2", True),  # one optimizer becomes two, experts spread: EP 1 to 2
        ("pp2_vpp2_ep2", "tp2_sp", True),
        ("tp2_sp", "cp2", None),  # in float64, where nothing but rounding at 1e-14 may differ
        ("ep2", "dp4", True),
        pytest.param("ep2", "ep4", True, marks=pytest.mark.slow),
        pytest.param("dp2", "tp2_pp2_ep2", True, marks=pytest.mark.slow),
        pytest.param("pp3_uneven", "pp2_vpp2_uneven", False, marks=pytest.mark.slow),
        pytest.param("ep2_etp2", "mbs2", True, marks=pytest.mark.slow),
        # The embedding that two stages hold becomes one, and two again.
        pytest.param("deepseek_pp2", "deepseek_tp2_sp", True, marks=pytest.mark.slow),
        pytest.param("deepseek_ep2_mbs2", "deepseek_dp2_pp2_cp2", False, marks=pytest.mark.slow),
    ],
)
def test_resumed_in_another_layout(
    first: str, second: str, sharded: bool | None, nano_data: Path, tmp_path: Path
) -> None:
    """Optimizer state, data position and schedule go on in any other layout."""
    one, two = LAYOUTS[first], LAYOUTS[second]
    words = ("training.precision=fp64" if sharded is None else FP32, NOISE_FREE, *COSINE)
    model = [word for word in one.overrides if word.startswith("model.")]
    whole = train_case(recipe(nano_data, tmp_path / "whole", *words, *model), 1)
    run_dir = tmp_path / "moved"
    # The plain optimizer's state feeds the distributed one and the other way round.
    before = DISTRIBUTED if sharded else ()
    after = DISTRIBUTED if sharded is False else ()
    start = recipe(nano_data, run_dir, *words, *one.overrides, *before, "training.train_iters=5")
    # The schedule belongs to the whole run, not to where it is cut.
    start = start.model_copy(
        update={"optimizer": start.optimizer.model_copy(update={"lr_decay_iters": 10})}
    )
    train_case(start, one.world_size)
    rest = train_case(recipe(nano_data, run_dir, *words, *two.overrides, *after), two.world_size)
    found = differences(rest, _from(whole, 5))
    assert max(found.values()) < (1e-11 if sharded is None else 1e-5), found


@pytest.mark.distributed
def test_weights_alone_start_a_new_run(nano_data: Path, tmp_path: Path) -> None:
    """`checkpoint.load` with `load_optimizer=false` takes weights and nothing else."""
    first = tmp_path / "first"
    trained = train_case(recipe(nano_data, first, FP32, "training.train_iters=3"))
    words = (
        FP32,
        f"checkpoint.load={first}",
        "training.train_iters=1",
        "optimizer.lr=1e-30",
        "optimizer.lr_warmup_iters=0",
        "model.language.moe_router_bias_update_rate=0",
    )
    weights = train_case(recipe(nano_data, tmp_path / "w", *words, "checkpoint.load_optimizer=no"))
    assert weights.metrics[0]["iteration"] == 1
    assert weights.metrics[0]["consumed_samples"] == 4
    gap = differences(
        weights, Outcome(weights.losses, weights.grad_norms, [None], trained.parameters, [])
    )
    assert gap["parameters"] == 0.0
    everything = train_case(recipe(nano_data, tmp_path / "e", *words, "training.train_iters=4"))
    assert everything.metrics[0]["iteration"] == 4


@pytest.mark.distributed
def test_retention(nano_data: Path, tmp_path: Path) -> None:
    """The newest `keep_last` stay, and every multiple of `keep_every`."""
    words = ("checkpoint.save_interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    train_case(recipe(nano_data, tmp_path, FP32, *words, "training.train_iters=7"))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert kept == [f"iter_{i:07d}" for i in (3, 6, 7)]
