"""What a step reports: metrics.jsonl, TensorBoard and one log line, from one dictionary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.balance import loads_of
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.models.language.flops import attention_flops, linear_flops_per_token
from megatron_vlm.models.vision.flops import encoder_flops
from megatron_vlm.training.console import logger
from megatron_vlm.training.encoder_cost import flops_cost

# Forward and backward: each product of the forward pass has two in the backward pass.
_FORWARD_AND_BACKWARD = 3


class MetricsWriter:
    """Appends one object per step to metrics.jsonl and the same values, as float32, to TensorBoard.

    Opened at iteration n, it removes what an interrupted run had written beyond n, in both, so
    every step stands there once.
    """

    def __init__(self, run_dir: Path, iteration: int) -> None:
        self._path = run_dir / "metrics.jsonl"
        self.failed: str | None = None
        """Why what is written last could not be, if so; it is tried again with the next step."""
        self._cut(iteration)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = b""
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=iteration + 1)
        self._board_failed = False

    def write(self, metrics: dict[str, Any]) -> None:
        """Write one step; `iteration` is its number.

        A full disk does not end a run: what cannot be written waits for room, in metrics.jsonl;
        TensorBoard goes without.
        """
        self._waiting += json.dumps(metrics).encode() + b"\n"
        self._write_waiting()
        try:
            self._write_board(metrics)
        except OSError as error:
            if not self._board_failed:
                logger.warning("TensorBoard: steps from now on may be missing (%s)", error)
            self._board_failed = True

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                # As much of it as there is room for; the rest of a line follows later.
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if self.failed is None:
                logger.warning("%s: waits for room on the disk (%s)", self._path, error)
            self.failed = str(error)
        else:
            self.failed = None

    def _write_board(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            # The older form, though it is float32: of the newer one TensorBoard's EventAccumulator
            # keeps the steps that a resumed run has taken back.
            self._board.add_scalar(name, value, int(metrics["iteration"]))
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._write_waiting()
        os.close(self._file)
        if not self._board_failed:
            self._board.close()

    def _cut(self, iteration: int) -> None:
        if not self._path.exists():
            return
        kept = [
            line
            for line in self._path.read_text().splitlines(keepends=True)
            if line.endswith("\n") and json.loads(line)["iteration"] <= iteration
        ]
        temporary = self._path.with_suffix(f".{os.getpid()}")
        temporary.write_text("".join(kept))
        os.replace(temporary, self._path)


def model_flops(plan: StepPlan, config: RunConfig) -> float:
    """FLOPs of one step of both towers, forward and backward, real tokens and patches only."""
    language, vision, adapter = config.model.language, config.model.vision, config.model.adapter
    squares = sum(
        float((micro.segment_lengths.astype("float64") ** 2).sum())
        for replica in plan.micro_batches
        for micro in replica
    )
    total = linear_flops_per_token(language) * plan.tokens + attention_flops(language, squares)
    if vision is not None:
        grids = zip(plan.pictures.grid_h.tolist(), plan.pictures.grid_w.tolist(), strict=True)
        total += encoder_flops(grids, vision, adapter, language.hidden_size)
    return _FORWARD_AND_BACKWARD * total


def vision_imbalance(plan: StepPlan, config: RunConfig, world_size: int) -> float:
    """Largest over mean FLOPs of the ranks; 1 when even, or when there are no pictures."""
    vision = config.model.vision
    if vision is None or not len(plan.pictures):
        return 1.0
    shares, patches = plan.shares, plan.pictures.patches
    costs = flops_cost(config).part(shares.patches, patches[shares.picture])
    loads = loads_of(costs, shares.rank, world_size)
    return float(loads.max() / loads.mean())


def validation_line(iteration: int, validated: dict[str, float]) -> str:
    """One line of a validation's losses."""
    losses = (f"{name.replace('_', ' ')}: {value:.6E}" for name, value in validated.items())
    return " | ".join([f"validation after iteration {iteration}", *losses]) + " |"


def log_line(metrics: dict[str, Any], train_iters: int, world_size: int) -> str:
    """The field's one line per step."""
    losses = {
        name: value
        for name, value in metrics.items()
        if name.endswith("loss") and not name.startswith("validation")
    }
    parts = [
        f"iteration {metrics['iteration']:8d}/{train_iters:8d}",
        f"consumed samples: {metrics['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {metrics['step_time_s'] * 1e3:.1f}",
        f"learning rate: {metrics['learning_rate']:.6E}",
        f"global batch size: {metrics['global_batch_size']:5d}",
        *(f"{name.replace('_', ' ')}: {value:.6E}" for name, value in losses.items()),
        f"grad norm: {metrics['grad_norm']:.3f}",
        f"tokens/s: {metrics['tokens_per_second_per_device'] * world_size:.0f}",
        f"images/s: {metrics['images_per_second_per_device'] * world_size:.1f}",
        f"number of skipped iterations: {metrics['skipped_iterations']:3d}",
        f"number of nan iterations: {metrics['nan_iterations']:3d}",
    ]
    return " | ".join(parts) + " |"
