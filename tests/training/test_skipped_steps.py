"""A step whose loss or gradient is not finite leaves no trace but in the counters."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankFailed
from tests.training.driver import with_run
from tests.training_case import recipe

pytestmark = pytest.mark.distributed

SHARDED = (
    "training.precision=fp32",
    "optimizer.use_distributed_optimizer=true",
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
)


class _NanGradient(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan


def _poison(run: Any, kind: str, steps: tuple[int, ...]) -> None:
    """Spoil the last rank's loss or its gradient in these steps."""
    real = run.objective.losses

    def losses(output: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        found = real(output, batch)
        last = run.topology.rank == run.topology.layout.world_size - 1
        if run.progress.iteration + 1 in steps and last:
            if kind == "loss":
                # Its gradient stays finite: the loss alone must give it away.
                return {name: value + math.inf for name, value in found.items()}
            return {name: _NanGradient.apply(value) for name, value in found.items()}
        return found

    run.objective.losses = losses


def _state(run: Any) -> dict[str, torch.Tensor]:
    """Weights and biases of this rank, and the moments that it would write."""
    from megatron_vlm.checkpoint.optimizer_state import optimizer_tensors

    run.trainable.gather_parameters()
    model = run.step.model.sharded_state_dict()
    tensors = {name: entry.data.detach().clone() for name, entry in model.items()}
    for name, entry in optimizer_tensors(run.trainable, model, empty=False).items():
        if not entry.data.is_meta:
            tensors[name] = entry.data.detach().clone()
    return tensors


def _watch(kind: str, steps: tuple[int, ...]) -> Any:
    def use(run: Any) -> dict[str, Any]:
        from megatron_vlm.engine.routers import routers

        _poison(run, kind, steps)
        states, metrics, progress, loads = [_state(run)], [], [], []

        def observe(entry: dict[str, Any]) -> None:
            metrics.append(dict(entry))
            progress.append(asdict(run.progress))
            states.append(_state(run))
            found = routers(run.step.model.chunks)
            loads.append([router.tokens_per_expert.clone() for router in found])

        run.run(on_step=observe)
        return {"states": states, "metrics": metrics, "progress": progress, "loads": loads}

    return use


@pytest.mark.parametrize(
    ("kind", "world_size", "words"),
    [
        ("loss", 1, ()),
        ("gradient", 1, ()),
        ("loss", 2, SHARDED),
        ("gradient", 2, SHARDED),
        ("gradient", 2, ("parallel.pipeline_model_parallel_size=2",)),
    ],
    ids=["loss", "gradient", "loss_sharded", "gradient_sharded", "gradient_pipeline"],
)
def test_nothing_moves_but_the_counters(
    nano_data: Path, tmp_path: Path, kind: str, world_size: int, words: tuple[str, ...]
) -> None:
    config = recipe(nano_data, tmp_path, "training.train_iters=4", *words)
    ranks = with_run(config, _watch(kind, (3,)), world_size)
    names = {name for found in ranks for name in found["states"][2]}
    moments = {name for name in names if name.startswith("optimizer.exp_avg_sq.")}
    assert len(moments) == len([n for n in names if f"optimizer.exp_avg.{n}" in names]) > 10
    for found in ranks:
        before, after = found["states"][2], found["states"][3]
        for name, value in before.items():
            assert torch.equal(after[name], value), f"{name} moved in a skipped step"
        # It counts as seen, not as learnt from.
        progress = found["progress"]
        assert [entry["iteration"] for entry in progress] == [1, 2, 3, 4]
        assert [entry["consumed_samples"] for entry in progress] == [4, 8, 12, 16]
        assert [entry["skipped_iterations"] for entry in progress] == [0, 0, 1, 1]
        assert [entry["nan_iterations"] for entry in progress] == [0, 0, 1, 1]
        assert [entry["optimizer_steps"] for entry in progress] == [1, 2, 2, 3]
        for name in ("consumed_tokens", "consumed_documents"):
            values = [entry[name] for entry in progress]
            assert values == sorted(set(values)), name
        metrics = found["metrics"]
        assert [entry["skipped_iterations"] for entry in metrics] == [0, 0, 1, 1]
        assert [math.isfinite(entry["grad_norm"]) for entry in metrics] == [True, True, False, True]
        assert math.isfinite(metrics[2]["lm_loss"]) == (kind == "gradient")
        assert all(math.isfinite(metrics[step]["lm_loss"]) for step in (0, 1, 3))
        _assert_other_steps_moved(found, config.model.language.moe_router_bias_update_rate)


def _assert_other_steps_moved(found: dict[str, Any], rate: float) -> None:
    """Each step that was taken moved all weights, and biases by the rate towards balance."""
    for step in (0, 1, 3):
        before, after = found["states"][step], found["states"][step + 1]
        biases = [name for name in before if name.endswith("expert_bias")]
        for name, value in before.items():
            if "bias" not in name and not name.startswith("optimizer."):
                # The first warm-up step is small, not zero.
                assert not torch.equal(after[name], value), f"{name} stayed in step {step + 1}"
        for name, load in zip(biases, found["loads"][step], strict=True):
            expected = before[name] + rate * torch.sign(load.mean() - load)
            assert torch.allclose(after[name], expected, rtol=0, atol=1e-9), name


def test_skipping_is_not_endless(nano_data: Path, tmp_path: Path) -> None:
    """Two skipped in a row are allowed; a good step starts the count again, a third ends it."""
    words = ("training.train_iters=10", "training.skip_non_finite_limit=2")
    config = recipe(nano_data, tmp_path, *words)
    with pytest.raises(RankFailed) as caught:
        with_run(config, _watch("gradient", (1, 2, 4, 5, 6)))
    lines = str(caught.value).strip().splitlines()
    assert "UserError: 3 steps in a row" in lines[-1]
    assert "training.skip_non_finite_limit 2" in lines[-1] and "optimizer.lr" in lines[-1]
    # The sixth step is the one that ended it.
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(written) == 5
