"""The simulated order of passes is the engine's, on every rank of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.planning.schedule import fullest, passes
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import Layout, resolve_layout
from tests.ranks import run_ranks
from tests.training_case import RECIPE, recipe

CASES = {
    "pp1": (1, ()),
    "pp2": (2, ("parallel.pipeline_model_parallel_size=2",)),
    "pp3_uneven": (
        3,
        (
            "parallel.pipeline_model_parallel_size=3",
            "parallel.pipeline_model_parallel_layout='Et|tt|tL'",
        ),
    ),
    "pp4": (4, ("parallel.pipeline_model_parallel_size=4",)),
    "pp2_vpp2": (
        2,
        (
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
        ),
    ),
    "few_micro_batches": (
        2,
        (
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "training.global_batch_size=2",
        ),
    ),
}

QUICK = ("pp3_uneven", "pp2_vpp2")
"""The others are left to `make test-all`."""


def _observe(world: World, config: RunConfig) -> list[tuple[int, int]]:
    """(chunk, +1) as each forward pass ends, (chunk, -1) as each backward pass begins."""
    from megatron_vlm.topology.mesh import build_topology
    from megatron_vlm.training.datasets import open_training_data
    from megatron_vlm.training.loop import Run

    layout = resolve_layout(config, world.world_size)
    data = open_training_data(config)
    run = Run(config, build_topology(layout, start_distributed(world)), data, held_out={})
    seen: list[tuple[int, int]] = []

    def watch(chunk: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                seen.append((chunk, 1))
                output.register_hook(lambda gradient: seen.append((chunk, -1)))

        return hook

    for number, chunk in enumerate(run.step.model.chunks):
        chunk.register_forward_hook(watch(number))
    run.run()
    stop()
    return seen


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES],
)
def test_order_of_passes(case: str, nano_data: Path, tmp_path: Path) -> None:
    world_size, overrides = CASES[case]
    config = recipe(
        nano_data, tmp_path, "training.train_iters=1", "optimizer.lr_warmup_iters=0", *overrides
    )
    layout = resolve_layout(config, world_size)
    for rank, seen in enumerate(run_ranks(world_size, _observe, config)):
        assert seen == list(passes(layout, layout.coordinates(rank).pp)), rank


def _layout(world_size: int, *overrides: str) -> Layout:
    return resolve_layout(load_recipe(str(RECIPE), list(overrides)), world_size)


@pytest.mark.unit
def test_fullest_of_plain_1f1b() -> None:
    layout = _layout(4, "parallel.pipeline_model_parallel_size=4")
    assert [fullest(layout, pp, [1.0]) for pp in range(4)] == [[4], [3], [2], [1]]
    few = _layout(4, "parallel.pipeline_model_parallel_size=4", "training.global_batch_size=2")
    assert fullest(few, 0, [1.0]) == [2]


@pytest.mark.unit
def test_fullest_depends_on_what_weighs_most() -> None:
    layout = _layout(
        2,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    )
    # 2 * (ranks behind) + (chunks - 1) * ranks + 1 passes in flight on the first rank.
    assert sum(fullest(layout, 0, [1.0, 1.0])) == 5
    assert fullest(layout, 0, [1.0, 0.0])[0] >= fullest(layout, 0, [0.0, 1.0])[0]
    assert fullest(layout, 1, [0.0, 1.0])[1] == 1
