"""The simulated order of passes is the engine's, micro-batch by micro-batch, on every rank."""

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


def _case(
    world_size: int,
    pp: int,
    vpp: int | None = None,
    stages: str | None = None,
    batch: int = 4,
) -> tuple[int, tuple[str, ...]]:
    words = [
        f"parallel.pipeline_model_parallel_size={pp}",
        f"training.global_batch_size={batch * world_size // pp}",
    ]
    if vpp is not None:
        words.append(f"parallel.virtual_pipeline_model_parallel_size={vpp}")
    if stages is not None:
        words.append(f"parallel.pipeline_model_parallel_layout='{stages}'")
    return world_size, tuple(words)


CASES = {
    "pp1": _case(1, 1),
    "pp2": _case(2, 2),
    "pp2_five": _case(2, 2, batch=5),
    "pp2_dp2": _case(4, 2, batch=3),
    "pp3_uneven": _case(3, 3, stages="Et|tt|tL"),
    "pp3_uneven_seven": _case(3, 3, stages="Et|tt|tL", batch=7),
    "pp4": _case(4, 4),
    "pp4_two": _case(4, 4, batch=2),
    "pp4_nine": _case(4, 4, batch=9),
    "pp2_vpp2": _case(2, 2, vpp=2),
    "pp2_vpp2_eight": _case(2, 2, vpp=2, batch=8),
    "pp2_vpp3": _case(2, 2, vpp=3, stages="E|t|t|t|t|L", batch=6),
    "pp3_vpp2": _case(3, 3, vpp=2, stages="E|t|t|t|t|L", batch=6),
    "few_micro_batches": _case(2, 2, vpp=2, batch=2),
}
"""Micro-batches are four unless the name says otherwise."""

QUICK = ("pp3_uneven", "pp2_vpp2")
"""The others are left to `make test-all`."""


def _observe(world: World, config: RunConfig) -> list[tuple[bool, int, int]]:
    """A pass as each forward pass ends, and as each backward pass begins.

    A micro-batch is known by the rows it hands to the model, whatever the order.
    """
    from megatron_vlm.topology.mesh import build_topology
    from megatron_vlm.training.datasets import open_training_data
    from megatron_vlm.training.loop import Run

    layout = resolve_layout(config, world.world_size)
    data = open_training_data(config)
    run = Run(config, build_topology(layout, start_distributed(world)), data, held_out={})
    seen: list[tuple[bool, int, int]] = []
    rows: list[Any] = []
    build = run.step._micro_batches

    def build_and_note(data: Any) -> Any:
        batches = build(data)
        rows.extend(batch.rows for batch in batches)
        return batches

    run.step._micro_batches = build_and_note  # type: ignore[method-assign]

    def watch(chunk: int) -> Any:
        def hook(
            module: torch.nn.Module, args: Any, inputs: dict[str, Any], output: torch.Tensor
        ) -> None:
            given = inputs["packed_seq_params"]
            number = next(i for i, known in enumerate(rows) if known is given)
            seen.append((True, chunk, number))
            output.register_hook(lambda gradient: seen.append((False, chunk, number)))

        return hook

    for number, chunk in enumerate(run.step.model.chunks):
        chunk.register_forward_hook(watch(number), with_kwargs=True)
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
