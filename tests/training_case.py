"""Train the tiny model in any layout and bring back everything two runs can be compared by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from megatron_vlm.topology.mesh import build_topology, destroy_topology
from tests.ranks import run_ranks

RECIPE = Path(__file__).parent / "nano.yaml"


@dataclass
class Outcome:
    """What a run did, assembled over its ranks."""

    losses: list[float]
    grad_norms: list[float]
    balance: list[float | None]
    parameters: dict[str, torch.Tensor]
    metrics: list[dict[str, Any]]
    routing: list[dict[int, list[float]]] = field(default_factory=list)
    """Per step: tokens that each expert of each layer received."""
    margins: list[dict[int, float]] = field(default_factory=list)
    """Per step: how near each layer came to choosing otherwise: the smallest gap between the last
    expert chosen and the first not chosen."""
    shares: list[list[int]] = field(default_factory=list)
    """Per step: how many ranks shared each picture."""
    bare: list[int] = field(default_factory=list)
    """Per step: micro-batches without a picture."""
    passes: list[list[tuple[int, list[bool]]]] = field(default_factory=list)
    """Per rank and step: windows of features, and whether each chunk's activations were kept."""


def recipe(data_dir: Path, run_dir: Path, *overrides: str) -> RunConfig:
    """The tests' recipe on the tests' data, with overrides."""
    return load_recipe(
        str(RECIPE),
        [
            f"data.train={data_dir / 'train'}",
            f"data.validation.held_out={data_dir / 'held_out'}",
            f"run_dir={run_dir}",
            *overrides,
        ],
    )


def train_case(config: RunConfig, world_size: int = 1, **options: Any) -> Outcome:
    """Train `config` on `world_size` forked ranks."""
    results = run_ranks(world_size, _train, config, **options)
    if not results:
        return Outcome([], [], [], {}, [])
    metrics = results[0]["metrics"]
    return Outcome(
        losses=[entry["lm_loss"] for entry in metrics if "lm_loss" in entry],
        grad_norms=[entry["grad_norm"] for entry in metrics],
        balance=[entry.get("load_balancing_loss") for entry in metrics],
        parameters=assemble([result["parts"] for result in results]),
        metrics=metrics,
        routing=[
            {layer: counts for part in step for layer, counts in part.items()}
            for step in zip(*(result["routing"] for result in results), strict=True)
        ],
        margins=[
            {layer: min(part.get(layer, math.inf) for part in step) for layer in set().union(*step)}
            for step in zip(*(result["margins"] for result in results), strict=True)
        ],
        shares=results[0]["shares"],
        bare=results[0]["bare"],
        passes=[result["passes"] for result in results],
    )


def _train(world: World, config: RunConfig) -> dict[str, Any]:
    # Here and not at the top: these import the engine, which must stay out of test collection.
    from megatron_vlm.engine.routers import routers
    from megatron_vlm.training.datasets import open_held_out_data, open_training_data
    from megatron_vlm.training.loop import Run

    layout = resolve_layout(config, world.world_size)
    training_set = open_training_data(config)
    held_out = open_held_out_data(config, training_set)
    topology = build_topology(layout, start_distributed(world))
    seen: list[dict[str, Any]] = []
    routing: list[dict[int, list[float]]] = []
    margins: list[dict[int, float]] = []
    run = Run(config, topology, training_set, held_out)

    def observe(metrics: dict[str, Any]) -> None:
        seen.append(dict(metrics))
        found = routers(run.step.model.chunks)
        routing.append({r.layer_number: r.tokens_per_expert.tolist() for r in found})
        margins.append(dict(nearest))
        nearest.clear()

    nearest: dict[int, float] = {}

    def watch(router: Any, inputs: tuple, _: Any) -> None:
        with torch.no_grad():
            scores = torch.sigmoid(router.gating(inputs[0])) + router.expert_bias
            top = scores.topk(router.top_k + 1, dim=-1).values
            gap = float((top[..., -2] - top[..., -1]).min())
        nearest[router.layer_number] = min(gap, nearest.get(router.layer_number, math.inf))

    for router in routers(run.step.model.chunks):
        router.register_forward_hook(watch)

    shares: list[list[int]] = []
    bare: list[int] = []
    trained = run.step.train

    def train(data: Any) -> Any:
        table = data.plan.pictures
        seen_in = set(zip(table.replica.tolist(), table.micro_batch.tolist(), strict=True))
        bare.append(sum(map(len, data.plan.micro_batches)) - len(seen_in))
        shares.append(np.bincount(data.plan.shares.picture).tolist())
        return trained(data)

    run.step.train = train  # type: ignore[method-assign]

    passes: list[tuple[int, list[bool]]] = []
    encode = run.step._encode

    def watched_encode(data: Any, encoder: Any, grad: bool) -> Any:
        encoded = encode(data, encoder, grad)
        if grad and encoded is not None:
            assert run.step._delivery is not None
            kept = [chunk.kept for chunk in encoded.chunks]
            passes.append((len(run.step._delivery.windows), kept))
        return encoded

    run.step._encode = watched_encode  # type: ignore[method-assign]

    run.run(on_step=observe)
    run.trainable.gather_parameters()
    parts = local_parts(run.step.model.sharded_state_dict())
    dist.barrier()
    destroy_topology()
    stop()
    found = {"metrics": seen, "parts": parts, "routing": routing, "margins": margins}
    return found | {"shares": shares, "bare": bare, "passes": passes}


def local_parts(sharded: dict[str, Any]) -> list[tuple[str, tuple, tuple, torch.Tensor]]:
    """(name, global shape, offset, values) of every piece of this rank's parameters."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    parts = []
    for entry in sharded.values():
        pieces = (
            nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        )
        for piece in pieces:
            if isinstance(piece, ShardedTensor):
                value = piece.data.detach().clone()
                parts.append((piece.key, piece.global_shape, piece.global_offset, value))
    return parts


def assemble(ranks: list[list[tuple[str, tuple, tuple, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Whole parameters from every rank's pieces; copies must agree to the last bit."""
    whole: dict[str, torch.Tensor] = {}
    for parts in ranks:
        for name, shape, offset, value in parts:
            if name not in whole:
                whole[name] = torch.full(shape, float("nan"), dtype=value.dtype)
            region = tuple(
                slice(start, start + size) for start, size in zip(offset, value.shape, strict=True)
            )
            there = whole[name][region]
            known = ~torch.isnan(there)
            assert torch.equal(there[known], value[known]), f"copies of {name} differ between ranks"
            whole[name][region] = value
    for name, value in whole.items():
        assert not torch.isnan(value).any(), f"{name} is held by no rank, or is not finite"
    return whole


def differences(run: Outcome, reference: Outcome) -> dict[str, float]:
    """Largest relative differences of losses, norms, balance losses, and parameters."""

    def relative(values: list, others: list) -> float:
        assert len(values) == len(others) and values
        return max(
            abs(value - other) / max(abs(other), 1e-12)
            for value, other in zip(values, others, strict=True)
            if other is not None
        )

    assert run.parameters.keys() == reference.parameters.keys()
    found = {
        "losses": relative(run.losses, reference.losses),
        "grad_norms": relative(run.grad_norms, reference.grad_norms),
        "parameters": max(
            float((run.parameters[name] - value).norm() / value.norm().clamp(min=1e-12))
            if "bias" not in name
            else float((run.parameters[name] - value).abs().max())
            for name, value in reference.parameters.items()
        ),
    }
    if reference.balance[0] is not None:
        found["balance"] = relative(run.balance, reference.balance)
    return found
