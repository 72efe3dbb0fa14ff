"""A run that a test holds in its hands: built on forked ranks, used, and taken down."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_vlm.config import RunConfig
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from megatron_vlm.training.loop import Run


def with_run(config: RunConfig, use: Callable[[Run], Any], world_size: int = 1) -> list[Any]:
    """Call `use(run)` on every rank of a run of `config`; what each returned."""
    return run_ranks(world_size, _on_rank, config, use)


def _on_rank(world: World, config: RunConfig, use: Callable[[Run], Any]) -> Any:
    # Here and not at the top: these import the engine, which must stay out of test collection.
    from megatron_vlm.topology.mesh import build_topology, destroy_topology
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data
    from megatron_vlm.training.loop import Run

    layout = resolve_layout(config, world.world_size)
    training_set = open_training_data(config)
    held_out = open_held_out_data(config, training_set)
    topology = build_topology(layout, start_distributed(world))
    result = use(Run(config, topology, training_set, held_out))
    dist.barrier()
    destroy_topology()
    stop()
    return result
