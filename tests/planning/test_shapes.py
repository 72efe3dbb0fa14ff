"""Counts from the configuration are those of the modules that are really built, rank by rank."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import pytest

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.planning.report import place
from megatron_vlm.planning.shapes import (
    Parameters,
    model_parameters,
    rank_parameters,
)
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.parallel.layouts import DEEPSEEK, LAYOUTS
from tests.ranks import run_ranks
from tests.training_case import RECIPE

SHAPES = {
    "moe": (),
    "dense": ("model.language.num_moe_experts=null",),
    "grouped_queries": (
        "model.language.num_query_groups=2",
        "model.language.qk_layernorm=false",
        "model.language.kv_channels=24",
    ),
    "tied_text": (
        "model.vision=null",
        "model.language.share_embeddings_and_output_weights=true",
    ),
    "seed_vit": (
        "model.vision.gated_linear_unit=false",
        "model.vision.qk_layernorm=true",
        "model.adapter.merge=average",
    ),
    "wide_adapter": ("model.adapter.hidden_size=96",),
    "no_shared_experts": (
        "model.language.moe_shared_expert_intermediate_size=null",
        "model.language.first_k_dense_replace=2",
    ),
    "qwen2": ("model.language.num_moe_experts=null", "model.language.add_qkv_bias=true"),
    "deepseek": DEEPSEEK,
    "full_queries": (*DEEPSEEK, "model.language.q_lora_rank=null"),
}


def _config(*overrides: str) -> RunConfig:
    return load_recipe(str(RECIPE), list(overrides))


def _build(world: World, cases: dict[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """Counts by kind and expert coordinates of this rank in each layout."""
    from megatron.core import parallel_state

    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    device = start_distributed(world)
    found: dict[str, dict[str, Any]] = {}
    for name, config in cases.items():
        topology = build_topology(resolve_layout(config, world.world_size), device)
        model = build_model(config, topology, predicts_ahead=True)
        counts: dict[str, int] = defaultdict(int)
        for chunk in model.chunks:
            for parameter_name, parameter in chunk.named_parameters():
                routed = "mlp.experts." in parameter_name
                counts["experts" if routed else "decoder"] += parameter.numel()
        if model.encoder is not None:
            counts["trunk"] = sum(p.numel() for p in model.encoder.trunk.parameters())
            counts["adapter"] = sum(p.numel() for p in model.encoder.adapter.parameters())
        found[name] = {
            "counts": dict(counts),
            "ep": parallel_state.get_expert_model_parallel_rank(),
            "etp": parallel_state.get_expert_tensor_parallel_rank(),
        }
        destroy_topology()
    stop()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size",
    [
        pytest.param(size, marks=[pytest.mark.slow] if size > 4 else [])
        for size in sorted({layout.world_size for layout in LAYOUTS.values()} | {1})
    ],
)
def test_every_rank_holds_what_is_planned(world_size: int) -> None:
    cases = {
        name: _config(*layout.overrides)
        for name, layout in LAYOUTS.items()
        if layout.world_size == world_size
    }
    if world_size == 1:
        cases |= {name: _config(*overrides) for name, overrides in SHAPES.items()}
    if world_size == 2:
        for name, overrides in SHAPES.items():
            for size in ("tensor", "pipeline"):
                key = f"parallel.{size}_model_parallel_size=2"
                cases[f"{name}_{size}"] = _config(*overrides, key)
    ranks = run_ranks(world_size, _build, cases)
    for name, config in cases.items():
        layout = resolve_layout(config, world_size)
        for rank, found in enumerate(ranks):
            pp = layout.coordinates(rank).pp
            planned = rank_parameters(config.model, layout, pp)
            assert planned == Parameters(**found[name]["counts"]), (name, rank)
            at = place(layout, rank)
            if config.model.language.num_moe_experts is not None:
                assert (at.ep, at.etp) == (found[name]["ep"], found[name]["etp"]), (name, rank)


@pytest.mark.unit
@pytest.mark.parametrize("shape", SHAPES)
def test_one_process_holds_the_whole_model(shape: str) -> None:
    config = _config(*SHAPES[shape])
    layout = resolve_layout(config, 1)
    assert rank_parameters(config.model, layout, 0) == model_parameters(config.model)


@pytest.mark.unit
def test_shards_of_a_layout_add_up() -> None:
    config = _config(
        "parallel.tensor_model_parallel_size=2",
        "parallel.expert_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
    )
    layout = resolve_layout(config, 4)
    whole = asdict(model_parameters(config.model))
    held = [asdict(rank_parameters(config.model, layout, pp)) for pp in range(2)]
    # Both stages' experts, over two expert ranks: no copy anywhere.
    assert 2 * sum(stage["experts"] for stage in held) == whole["experts"]
    assert all(stage["trunk"] == whole["trunk"] for stage in held)
