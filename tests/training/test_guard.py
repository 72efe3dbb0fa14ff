"""Loss spikes and iterations that are passed over: what is left of them, and what is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.config.schema import GuardConfig
from megatron_vlm.resilience import events
from megatron_vlm.training.guard import is_spike, window_around
from tests.parallel.layouts import LAYOUTS
from tests.ranks import RankFailed
from tests.training.driver import with_run
from tests.training_case import Outcome, recipe, train_case

WORDS = ("training.train_iters=14", "checkpoint.save_interval=4")
GUARD = ("guard.spike_deviations=20", "guard.spike_window=8")
SHARDED = ("training.precision=fp32", "optimizer.use_distributed_optimizer=true")
SPIKE = 11


@pytest.mark.unit
def test_a_spike_is_far_above_what_varies() -> None:
    settings = GuardConfig(spike_deviations=5.0, spike_window=64)
    noise = np.random.default_rng(0).normal(3.0, 0.1, 10_000)
    found = sum(
        is_spike(float(noise[i]), noise[i - 64 : i].tolist(), settings) for i in range(64, 10_000)
    )
    # Beyond five deviations lies one of three million; the deviation is an estimate of 64.
    assert found <= 3
    before = noise[:64].tolist()
    assert is_spike(4.0, before, settings) and not is_spike(2.0, before, settings)
    assert not is_spike(4.0, before[:7], settings), "too few to compare with"
    assert not is_spike(9.0, before, GuardConfig())
    flat = [3.0] * 64
    assert not is_spike(3.01, flat, settings) and is_spike(3.02, flat, settings)
    # One that was told and taken hardly moves what the next is compared with.
    assert is_spike(4.0, [*before[1:], 40.0], settings)


@pytest.mark.unit
def test_window() -> None:
    assert list(window_around(5, GuardConfig())) == [5]
    around = GuardConfig(spike_skip_before=2, spike_skip_after=1)
    assert list(window_around(5, around)) == [3, 4, 5, 6]
    assert list(window_around(1, around)) == [1, 2]


def _spiking(always: bool = False) -> Any:
    """A run whose loss is multiplied by eight in one iteration."""

    def use(run: Any) -> list[dict[str, Any]]:
        real, metrics = run.objective.losses, []

        def losses(output: Any, batch: Any) -> Any:
            found = real(output, batch)
            now = run.progress.iteration + 1
            if now == SPIKE or (always and now > SPIKE):
                return {name: 8 * value for name, value in found.items()}
            return found

        run.objective.losses = losses
        run.run(lambda entry: metrics.append(entry["iteration"]))
        return metrics

    return use


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _final(run_dir: Path, data: Path, words: tuple[str, ...], ranks: int) -> Outcome:
    """Parameters at the end of a finished run: one step of the same kind goes on from it."""
    more = (*words, "training.train_iters=15")
    return train_case(recipe(data, run_dir, *more), ranks)


@pytest.mark.distributed
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("name", ["dp2", "pp2_vpp2_ep2"])
def test_a_spike_leaves_nothing(policy: str, name: str, nano_data: Path, tmp_path: Path) -> None:
    """What goes on is the run that was told to pass over the same iteration, to the bit."""
    layout = LAYOUTS[name]
    words = (*WORDS, *SHARDED, *layout.overrides)
    told = tmp_path / "told"
    skip = f"training.iterations_to_skip=[{SPIKE}]"
    train_case(recipe(nano_data, told, *words, skip), layout.world_size)
    run_dir = tmp_path / "spiked"
    guarded = (*words, *GUARD, f"guard.spike_policy={policy}")
    seen = with_run(recipe(nano_data, run_dir, *guarded), _spiking(), layout.world_size)
    back = list(range(9, 15)) if policy == "rollback" else list(range(11, 15))
    assert seen[0] == [*range(1, 11), *back]
    mine, theirs = _lines(run_dir), _lines(told)
    assert [e["iteration"] for e in mine] == list(range(1, 15))
    for one, other in zip(mine, theirs, strict=True):
        if one["iteration"] != SPIKE:
            assert one["lm_loss"] == other["lm_loss"] and one["grad_norm"] == other["grad_norm"]
        assert one["consumed_tokens"] == other["consumed_tokens"]
        assert one["skipped_iterations"] == other["skipped_iterations"]
        assert one["nan_iterations"] == 0
    assert "lm_loss" not in theirs[SPIKE - 1] and math.isnan(mine[SPIKE - 1]["grad_norm"])
    assert ("lm_loss" in mine[SPIKE - 1]) == (policy == "skip")
    (spike,) = [e for e in events.read(run_dir) if e["event"] == "loss spike"]
    assert spike["iteration"] == SPIKE
    back_to = [e for e in events.read(run_dir) if e["event"] == "rolled back"]
    assert [(e["to"], e["skips"]) for e in back_to] == ([(8, [11])] if policy != "skip" else [])
    # A resumed run still passes over what it learnt to: its parameters are the others'.
    one, other = (_final(folder, nano_data, words, layout.world_size) for folder in (run_dir, told))
    assert one.losses == other.losses
    assert all((one.parameters[n] == other.parameters[n]).all() for n in one.parameters)


@pytest.mark.distributed
def test_without_a_checkpoint_the_step_is_skipped(nano_data: Path, tmp_path: Path) -> None:
    words = ("training.train_iters=12", *GUARD, "guard.spike_policy=rollback")
    with_run(recipe(nano_data, tmp_path, *words), _spiking(), 2)
    (spike,) = [e for e in events.read(tmp_path) if e["event"] == "loss spike"]
    assert spike["done"] == "not taken"
    assert [e["skipped_iterations"] for e in _lines(tmp_path)] == [0] * 10 + [1, 1]


@pytest.mark.distributed
def test_told_only(nano_data: Path, tmp_path: Path) -> None:
    with_run(recipe(nano_data, tmp_path, *WORDS, *GUARD), _spiking(), 1)
    (spike,) = [e for e in events.read(tmp_path) if e["event"] == "loss spike"]
    assert spike["done"] == "only told"
    assert all(e["skipped_iterations"] == 0 for e in _lines(tmp_path))


@pytest.mark.distributed
def test_not_for_ever(nano_data: Path, tmp_path: Path) -> None:
    words = (*WORDS, *GUARD, "guard.spike_policy=rollback", "guard.max_rollbacks=2")
    with pytest.raises(RankFailed, match="after 2 rollbacks"):
        with_run(recipe(nano_data, tmp_path, *words), _spiking(always=True), 2)
    spikes = [e["iteration"] for e in events.read(tmp_path) if e["event"] == "loss spike"]
    assert spikes == [11, 12, 13]
