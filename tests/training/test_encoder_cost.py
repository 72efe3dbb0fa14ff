"""What encoding is taken to cost: measured once, kept, read back; and what of it is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.engine.encoder_timing import fit_cost, timed_shapes
from megatron_vlm.errors import ConfigError
from megatron_vlm.training.encoder_cost import COST_FILE, given_cost, read_cost
from tests.ranks import RankFailed
from tests.training.driver import with_run
from tests.training_case import recipe


@pytest.mark.unit
@pytest.mark.parametrize("cost", [(1e-3, 2e-6, 3e-10), (0.0, 2e-6, 3e-10), (1e-3, 2e-6, 0.0)])
def test_what_was_put_in_is_found(cost: tuple[float, float, float]) -> None:
    shapes = timed_shapes(12_800, 2)
    assert shapes[0] == (4, 256) and shapes[-1] == (112, 1)
    counts, patches = np.array([(float(n), float(side**2)) for side, n in shapes]).T
    truth = EncoderCost(*cost)
    seconds = counts * truth.whole(patches.astype(np.int64))
    found = fit_cost(counts, patches, seconds)
    assert list(asdict(found).values()) == pytest.approx([*cost, 0.0], rel=1e-6, abs=1e-18)
    # Noise never makes a term negative, nor the fit worse than the noise.
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = fit_cost(counts, patches, seconds * rng.uniform(0.9, 1.1, len(seconds)))
        assert min(asdict(noisy).values()) >= 0
        again = counts * noisy.whole(patches.astype(np.int64))
        assert np.abs(again / seconds - 1).max() < 0.25


def _cost_and_metrics(run: Any) -> tuple[dict[str, float], list[float]]:
    seen: list[float] = []
    run.run(on_step=lambda metrics: seen.append(metrics["lm_loss"]))
    return asdict(run.view.sharing.cost), seen


@pytest.mark.distributed
def test_measured_once_and_read_back(nano_data: Path, tmp_path: Path) -> None:
    words = ("vision_parallel.cost=measured", "training.train_iters=2")
    config = recipe(nano_data, tmp_path, *words)
    first = with_run(config, _cost_and_metrics, 2)
    kept = json.loads((tmp_path / COST_FILE).read_text())
    assert [cost for cost, _ in first] == [kept, kept]
    assert kept["per_patch"] + kept["per_pair"] > 0 and kept["per_shared_patch"] > 0
    # A resume plans with what the run began with, whatever it would measure now.
    changed = {**kept, "per_picture": 0.125}
    (tmp_path / COST_FILE).write_text(json.dumps(changed))
    longer = recipe(nano_data, tmp_path, *words, "training.train_iters=4")
    second = with_run(longer, _cost_and_metrics, 2)
    assert [cost for cost, _ in second] == [changed, changed]
    # Who encodes what changes nothing that is learned.
    plain = with_run(recipe(nano_data, tmp_path / "flops", *words[1:]), _cost_and_metrics, 2)
    assert plain[0][1] == pytest.approx(first[0][1], rel=1e-11)
    assert not (tmp_path / "flops" / COST_FILE).exists()
    named = f"vision_parallel.cost={tmp_path / COST_FILE}"
    third = with_run(recipe(nano_data, tmp_path / "named", named), lambda run: run.view, 2)
    assert asdict(third[1].sharing.cost) == changed


@pytest.mark.unit
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "expected an object"),
        ('{"per_patch": 1}', "per_picture"),
        ('{"per_picture": 0, "per_patch": 0, "per_pair": 0}', "found"),
        ('{"per_picture": 0, "per_patch": -1, "per_pair": 5}', "found"),
        ('{"per_picture": 0, "per_patch": "x", "per_pair": 5}', "could not convert"),
        ('{"per_picture": 0, "per_patch": 1, "per_pair": 5, "more": 1}', "more"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_cost(path, "vision_parallel.cost: ")
    assert str(caught.value).startswith(f"vision_parallel.cost: {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.unit
def test_before_any_rank_starts(nano_data: Path, tmp_path: Path) -> None:
    missing = recipe(nano_data, tmp_path, f"vision_parallel.cost={tmp_path / 'none.json'}")
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        given_cost(missing)


@pytest.mark.distributed
def test_a_measurement_that_was_damaged(nano_data: Path, tmp_path: Path) -> None:
    (tmp_path / COST_FILE).write_text("{}")
    config = recipe(nano_data, tmp_path, "vision_parallel.cost=measured")
    with pytest.raises(RankFailed, match=COST_FILE):
        with_run(config, lambda run: None)
