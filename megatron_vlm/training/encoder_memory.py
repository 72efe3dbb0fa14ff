"""The memory that a run grants its encoder, as the step takes it."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data.plan import StepPlan
from megatron_vlm.engine.encode import Budget
from megatron_vlm.planning.activations import Device
from megatron_vlm.planning.step_memory import share_patches
from megatron_vlm.planning.vision_limits import encoder_patches


def encoder_budget(config: RunConfig, device: Device) -> Callable[[StepPlan], Budget] | None:
    """Finds a step's budget of activations; null: any amount.

    Raises:
        ConfigError: two of the largest pictures do not fit.
    """
    patches = encoder_patches(config, device)
    if patches is None:
        return None
    return lambda plan: Budget(patches, share_patches(config, device, plan))
