"""The objective seam carries more than next-token prediction: a preference loss on pairs.

Direct preference optimisation on pairs of neighbouring samples: two losses with denominators of
their own, segments taken in pairs, and a forward of a frozen reference before every step. It
lives here, registered from outside: nothing in the engine knows it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.engine.microbatch import MicroBatch
from megatron_vlm.engine.objective import (
    NextToken,
    Objective,
    counted_once,
    label_log_probs,
    register_objective,
    segment_sums,
)
from megatron_vlm.engine.step import TrainStep
from tests.parallel.layouts import DEEPSEEK, LAYOUTS
from tests.training_case import differences, recipe, train_case

BETA = 0.5


def _pairs(batch: MicroBatch) -> torch.Tensor:
    """[pairs, 2] neighbouring real segments of a row: the first is preferred."""
    pairs, segment = [], 0
    for row in batch.plan.rows:
        count = len(row.sample)
        pairs += [(segment + i, segment + i + 1) for i in range(0, count - 1, 2)]
        used = int(row.padded.sum())
        length = batch.plan.num_tokens // len(batch.plan.rows)
        segment += count + (1 if used < length else 0)
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


class Preference(Objective):
    """DPO beside a little next-token loss on the preferred answers."""

    loss_weights = {"preference_loss": 1.0, "lm_loss": 0.1}
    needs_reference = True

    def before_step(self, step: TrainStep, micro_batches: list[MicroBatch]) -> None:
        assert step.reference is not None
        found = step.forward_only(
            step.reference,
            micro_batches,
            lambda output, batch: self._segments(output, batch),
        )
        for batch, sums in zip(micro_batches, found, strict=False):
            batch.extras = {"reference": sums}

    def counts(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        pairs = torch.tensor(float(len(_pairs(batch))))
        return {
            "preference_loss": counted_once(pairs, self.topology),
            "lm_loss": self._preferred(batch).sum(),
        }

    def losses(self, output: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        assert batch.extras is not None
        pairs = _pairs(batch)
        gain = self._segments(output, batch) - batch.extras["reference"]
        margin = gain[pairs[:, 0]] - gain[pairs[:, 1]]
        preference = -F.logsigmoid(BETA * margin).sum()
        log_probs = label_log_probs(output, batch, self.topology)
        return {
            "preference_loss": counted_once(preference, self.topology),
            "lm_loss": -(log_probs * self._preferred(batch)).sum(),
        }

    def _segments(self, output: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        log_probs = label_log_probs(output, batch, self.topology) * batch.loss_mask
        return segment_sums(log_probs, batch, self.topology)

    def _preferred(self, batch: MicroBatch) -> torch.Tensor:
        chosen = torch.zeros(batch.num_segments)
        chosen[_pairs(batch)[:, 0]] = 1
        return batch.loss_mask * chosen[batch.segment_ids]


register_objective("preference", Preference)


def _train(data: Path, run_dir: Path, world_size: int, *words: str) -> Any:
    base = ("training.objective=preference", "training.train_iters=4", "training.eval_interval=2")
    return train_case(recipe(data, run_dir, *base, *words), world_size)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "window"),
    [
        # Features of both encoders, the reference's too, arrive micro-batch by micro-batch.
        ("pp2_cp2_ep2", 1),
        pytest.param("tp2_sp", None, marks=pytest.mark.slow),
        pytest.param("pp2_vpp2_ep2_overlap", None, marks=pytest.mark.slow),
        pytest.param("dp2_mbs2", 1, marks=pytest.mark.slow),
    ],
)
def test_preference_equals_one_process(
    name: str, window: int | None, nano_data: Path, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    words = [f"vision_parallel.exchange_window={window}"] if window else []
    one = _train(nano_data, tmp_path / "one", 1)
    run = _train(nano_data, tmp_path / "run", layout.world_size, *layout.overrides, *words)
    assert max(differences(run, one).values()) < 1e-11
    for mine, theirs in zip(run.metrics, one.metrics, strict=True):
        for key in ("preference_loss", "validation_preference_loss", "validation_loss"):
            assert (key in mine) == (key in theirs)
            if key in mine:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-11)
    assert "validation_preference_loss" in one.metrics[-1]


@pytest.mark.distributed
def test_further_prediction_rests_where_it_is_not_trained(nano_data: Path, tmp_path: Path) -> None:
    """A model with multi-token prediction under an objective without: nobody waits for its
    gradients, and its weights stay."""
    words = (*DEEPSEEK, "training.precision=fp32", "optimizer.adam_eps=1e-6")
    overlaps = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    sharded = [f"optimizer.{name}=true" for name in overlaps]
    one = _train(nano_data, tmp_path / "one", 1, *words)
    run = _train(nano_data, tmp_path / "run", 4, *words, *LAYOUTS["pp2"].overrides, *sharded)
    assert max(differences(run, one).values()) < 1e-5
    assert "mtp_loss" not in one.metrics[-1]
    for name, value in one.parameters.items():
        if ".mtp." in name and name.endswith("norm.weight"):
            assert bool((value == 1).all()), name


@pytest.mark.distributed
def test_preference_learns(nano_data: Path, tmp_path: Path) -> None:
    """At the start the policy is its reference: ln 2 exactly; then the margin grows."""
    words = ("optimizer.lr=3e-4", "training.train_iters=12", "data.shuffle=false")
    run = _train(nano_data, tmp_path / "run", 1, *words)
    losses = [entry["preference_loss"] for entry in run.metrics]
    assert losses[0] == pytest.approx(0.6931471805599453, rel=1e-12)
    # The set is seen several times.
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0], losses


class Watched(Preference):
    """Reports, at no weight, what the reference thinks of every answer."""

    loss_weights = {**Preference.loss_weights, "reference_loss": 0.0}

    def counts(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {**super().counts(batch), "reference_loss": batch.loss_mask.sum()}

    def losses(self, output: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        total = -batch.extras["reference"].sum() + 0 * output.sum()
        return {
            **super().losses(output, batch),
            "reference_loss": counted_once(total, self.topology),
        }


register_objective("watched", Watched)


@pytest.mark.distributed
def test_reference_stays_the_starting_model(nano_data: Path, tmp_path: Path) -> None:
    """Also its sight: it looks through an encoder of its own, not the one that is trained."""
    found = []
    for rate in ("3e-3", "1e-30"):
        words = ("training.objective=watched", f"optimizer.lr={rate}", "optimizer.min_lr=0")
        run = _train(nano_data, tmp_path / rate, 1, *words)
        found.append([entry["reference_loss"] for entry in run.metrics])
    assert found[0] == pytest.approx(found[1], rel=1e-13)


THIN = 2.0**-20  # exact in any precision


class Thin(NextToken):
    """Next-token prediction in which every token weighs a millionth."""

    def counts(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {name: value * THIN for name, value in super().counts(batch).items()}

    def losses(self, output: torch.Tensor, batch: MicroBatch) -> dict[str, torch.Tensor]:
        return {name: value * THIN for name, value in super().losses(output, batch).items()}


register_objective("thin", Thin)


@pytest.mark.distributed
def test_denominators_may_be_small(nano_data: Path, tmp_path: Path) -> None:
    words = ("training.train_iters=3", "training.eval_interval=3")
    runs = [
        train_case(recipe(nano_data, tmp_path / name, *words, f"training.objective={name}"))
        for name in ("next_token", "thin")
    ]
    assert max(differences(*runs).values()) < 1e-11
    last, thin = (run.metrics[-1]["validation_loss"] for run in runs)
    assert thin == pytest.approx(last, rel=1e-11)
