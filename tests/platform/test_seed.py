"""Random state of a step is a function of (seed, iteration), whatever was drawn before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlm.config import load_recipe
from megatron_vlm.platform import World, seed_step, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks
from tests.training_case import RECIPE


def _draws(world: World, asked: list[tuple[int, int]]) -> list[list[Any]]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    config = load_recipe(str(RECIPE), ["parallel.tensor_model_parallel_size=2"])
    build_topology(resolve_layout(config, world.world_size), start_distributed(world))
    found = []
    for seed, iteration in asked:
        seed_step(seed, iteration)
        with get_cuda_rng_tracker().fork():
            inside = torch.rand(2).tolist()
        # These leave each generator in another place for the next one asked.
        outside = torch.rand(2 + len(found)).tolist()
        found.append([random.random(), float(np.random.rand()), *outside[:2], *inside])
    destroy_topology()
    stop()
    return found


@pytest.mark.distributed
def test_draws_depend_on_seed_and_iteration_alone() -> None:
    asked = [(1, 5), (1, 6), (2, 5), (1, 5), (5, 1), (0, 0), (2**40, 10**7)]
    first, second = run_ranks(2, _draws, asked)
    for found in (first, second):
        assert found[0] == found[3], "the same step, after other draws"
        others = [found[i] for i in (0, 1, 2, 4, 5, 6)]
        for column in zip(*others, strict=True):
            assert len(set(column)) == len(column), "another seed or iteration, the same draw"
    for mine, theirs in zip(first, second, strict=True):
        assert mine[:4] == theirs[:4], "what is replicated is drawn alike on tensor ranks"
        assert set(mine[4:]).isdisjoint(theirs[4:]), "what is split is drawn differently"
