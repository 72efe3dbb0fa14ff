"""Gradients of both towers against finite differences of the loss: independent of any layout.

That all layouts agree would also hold if all were wrong in the same way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlm.config import RunConfig
from megatron_vlm.platform import World, start_distributed
from megatron_vlm.topology.layout import resolve_layout
from megatron_vlm.topology.mesh import build_topology
from tests.ranks import run_ranks
from tests.training_case import recipe

# So small that no token is routed differently on the way; rounding is at 1e-9 of a slope.
STEP = 1e-7


def _compare(world: World, config: RunConfig) -> dict[str, tuple[float, float]]:
    """Per parameter: norm of its gradient, and the slope of the loss along that gradient."""
    from megatron_vlm.training.datasets import open_training_data
    from megatron_vlm.training.loop import Run

    topology = build_topology(resolve_layout(config, 1), start_distributed(world))
    run = Run(config, topology, open_training_data(config), {})
    with run._loader() as loader:
        data = next(loader)
    run.step.train(data)

    def loss() -> float:
        sums, counts = run.step.evaluate(data)
        return sums["lm_loss"] / counts["lm_loss"]

    found = {}
    assert run.trainable.encoder is not None
    for module in (run.trainable.encoder.module, run.trainable.chunks[0].module):
        for name, parameter in module.named_parameters():
            norm = parameter.main_grad.norm()
            along = parameter.main_grad / norm.clamp(min=1e-30) * STEP
            with torch.no_grad():
                parameter.add_(along)
                above = loss()
                parameter.sub_(2 * along)
                below = loss()
                parameter.add_(along)
            found[name] = (float(norm), (above - below) / (2 * STEP))
    return found


@pytest.mark.distributed
def test_gradients_are_slopes_of_the_loss(nano_data: Path, tmp_path: Path) -> None:
    # The balance loss acts on gradients alone; the loss reported does not hold it.
    words = ("model.language.moe_aux_loss_coeff=0", "training.global_batch_size=4")
    (found,) = run_ranks(1, _compare, recipe(nano_data, tmp_path, *words))
    assert len(found) > 60 and min(norm for norm, _ in found.values()) > 0
    for name, (norm, slope) in found.items():
        assert slope == pytest.approx(norm, rel=1e-4, abs=1e-8), name
