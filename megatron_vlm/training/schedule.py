"""The learning rate as a function of the iteration: linear warm-up, then constant or cosine."""

from __future__ import annotations

import math

from megatron_vlm.config.schema import RunConfig


def learning_rate(config: RunConfig, iteration: int) -> float:
    """Rate of step `iteration` (from 1).

    Warm-up rises linearly to `lr` at step `lr_warmup_iters`; cosine then falls to `min_lr` at
    `lr_decay_iters` and stays there.
    """
    settings = config.optimizer
    warmup = settings.lr_warmup_iters
    if iteration <= warmup:
        return settings.lr * iteration / warmup
    if settings.lr_decay_style == "constant":
        return settings.lr
    end = settings.lr_decay_iters or config.training.train_iters
    done = min(1.0, (iteration - warmup) / max(1, end - warmup))
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
