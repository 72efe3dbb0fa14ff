"""Loss spikes: found against the losses before, and skipped or taken back.

Which data a spike comes from cannot be told from the loss, so what helps is to go on without them:
PaLM (arXiv 2204.02311, section 5.1) went back to a checkpoint and left out the data around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_vlm.checkpoint.checkpointer import Progress
from megatron_vlm.checkpoint.folder import list_iterations
from megatron_vlm.config.schema import GuardConfig
from megatron_vlm.errors import UserError
from megatron_vlm.resilience import events
from megatron_vlm.training.console import logger

_LEAST_LOSSES = 8
_NORMAL = 1.4826
"""Times the median distance from the median: the standard deviation of what is spread normally."""
_SMALLEST_SPREAD = 1e-3
"""Of the median: losses that hardly vary must not make a spike of every breath."""


def is_spike(loss: float, before: Sequence[float], settings: GuardConfig) -> bool:
    """Whether a loss lies too far above those of the steps before it.

    Args:
        loss: of this step.
        before: of up to `spike_window` steps that were taken, the newest last.
        settings: `spike_deviations` says how far; null: nothing is a spike.
    """
    if settings.spike_deviations is None or len(before) < min(_LEAST_LOSSES, settings.spike_window):
        return False
    median = float(np.median(before))
    spread = _NORMAL * float(np.median(np.abs(np.subtract(before, median))))
    spread = max(spread, _SMALLEST_SPREAD * abs(median))
    return loss > median + settings.spike_deviations * spread


def window_around(iteration: int, settings: GuardConfig) -> range:
    """Iterations that are left out because of a spike in one."""
    first = max(1, iteration - settings.spike_skip_before)
    return range(first, iteration + settings.spike_skip_after + 1)


def judged_loss(losses: Mapping[str, float]) -> float:
    """The loss that spikes are looked for in: the language model's, else the objective's first."""
    return losses["lm_loss"] if "lm_loss" in losses else next(iter(losses.values()), 0.0)


class Guard:
    """Decides about the loss of every step; alike on all ranks, which all have the same losses."""

    def __init__(
        self, settings: GuardConfig, run_dir: Path, is_main: bool, anyone: Callable[[bool], bool]
    ) -> None:
        """For one run.

        Args:
            settings: what is a spike, and what is done.
            run_dir: the run's folder.
            is_main: whether this rank tells.
            anyone: whether something holds on any rank; collective.
        """
        self._settings, self._run_dir = settings, run_dir
        self._is_main, self._anyone = is_main, anyone

    def judge(
        self, losses: Mapping[str, float], progress: Progress
    ) -> Literal["take", "skip", "rollback"]:
        """What is done with a step whose losses are known and whose gradients are not applied yet.

        Raises:
            UserError: the run was set back too often.
        """
        settings, loss, iteration = self._settings, judged_loss(losses), progress.iteration + 1
        if not is_spike(loss, progress.recent_losses, settings):
            return "take"
        policy = settings.spike_policy
        if policy == "rollback" and not self._has_checkpoint():
            policy = "skip"
        if self._is_main:
            told = {"warn": "only told", "skip": "not taken", "rollback": "taken back"}[policy]
            logger.warning("loss spike at iteration %d: %.4f, %s", iteration, loss, told)
            events.tell(self._run_dir, "loss spike", iteration=iteration, loss=loss, done=told)
        if policy == "rollback" and progress.rollbacks >= settings.max_rollbacks:
            raise UserError(
                f"loss spike at iteration {iteration} ({loss:.4f}) after {progress.rollbacks} "
                f"rollbacks (guard.max_rollbacks {settings.max_rollbacks}); lower optimizer.lr, "
                f"or look at the data from row {progress.consumed_samples}"
            )
        return "take" if policy == "warn" else policy

    def _has_checkpoint(self) -> bool:
        return self._anyone(self._is_main and bool(list_iterations(self._run_dir / "checkpoints")))
