"""Weights, gradients and optimizer state as planned against those of real ranks; and arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config import RunConfig, load_recipe
from megatron_vlm.errors import ConfigError
from megatron_vlm.planning.memory import Assumptions, RankMemory, memory_of_stage
from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks
from tests.training_case import RECIPE, recipe

TP2 = "parallel.tensor_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
DISTRIBUTED = "optimizer.use_distributed_optimizer=true"
CASES = {
    "fp64": (1, ()),
    "fp32_distributed": (2, ("training.precision=fp32", DISTRIBUTED)),
    "bf16": (2, ("training.precision=bf16", PP2)),
    "bf16_distributed": (4, ("training.precision=bf16", DISTRIBUTED, TP2, EP2)),
    "freeze_vision": (2, ("training.precision=bf16", DISTRIBUTED, "training.freeze=[vision]")),
    "freeze_language": (1, ("training.precision=fp32", "training.freeze=[language,vision]")),
}

QUICK = ("bf16_distributed", "freeze_language")
"""The others are left to `make test-all`."""


def _held(world: World, config: RunConfig) -> dict[str, int]:
    """Bytes of this rank after one step."""
    from megatron_vlm.topology.mesh import build_topology
    from megatron_vlm.training.datasets import open_training_data
    from megatron_vlm.training.loop import Run

    layout = resolve_layout(config, world.world_size)
    data = open_training_data(config)
    run = Run(config, build_topology(layout, start_distributed(world)), data, held_out={})
    run.run()
    trainable = run.trainable
    modules: list[Any] = [*run.step.model.chunks, run.step.model.encoder]
    weights = {id(p): p for module in modules for p in module.parameters()}
    wrapped = [module for module in (*trainable.chunks, trainable.encoder) if module is not None]
    gradients = sum(
        buffer.grad_data.nbytes
        for module in wrapped
        for buffer in (*module.buffers, *module.expert_parallel_buffers)
    )
    own = {p.untyped_storage().data_ptr() for p in weights.values()}
    state: dict[int, torch.Tensor] = {}
    for part in trainable.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state[id(parameter)] = parameter
                for value in part.optimizer.state[parameter].values():
                    if torch.is_tensor(value) and value.numel() > 1:
                        state[id(value)] = value
    stop()
    return {
        "weights": sum(p.nbytes for p in weights.values()),
        "gradients": gradients,
        "optimizer": sum(
            t.nbytes for t in state.values() if t.untyped_storage().data_ptr() not in own
        ),
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES],
)
def test_state_of_real_ranks(case: str, nano_data: Path, tmp_path: Path) -> None:
    world_size, overrides = CASES[case]
    config = recipe(
        nano_data, tmp_path, "training.train_iters=1", "optimizer.lr_warmup_iters=0", *overrides
    )
    layout = resolve_layout(config, world_size)
    ranks = run_ranks(world_size, _held, config)
    for pp in range(layout.pp):
        planned = memory_of_stage(config, layout, pp, Assumptions(device="cpu")).kinds()
        here = [held for i, held in enumerate(ranks) if layout.coordinates(i).pp == pp]
        for held in here:
            assert planned["weights"] == held["weights"]
            # Buffers are padded so that they split evenly.
            assert planned["gradients"] == pytest.approx(held["gradients"], rel=0.02)
        # Shards of a distributed optimizer are cut through parameters: even only on average.
        mean = sum(held["optimizer"] for held in here) / len(here)
        assert planned["optimizer"] == pytest.approx(mean, rel=0.02)


def _config(*overrides: str) -> RunConfig:
    return load_recipe(
        str(RECIPE), ["training.seq_length=256", "training.precision=bf16", *overrides]
    )


def _plan(
    world_size: int, *overrides: str, pp: int = 0, assumptions: Assumptions | None = None
) -> RankMemory:
    config = _config(*overrides)
    layout = resolve_layout(config, world_size)
    return memory_of_stage(config, layout, pp, assumptions or Assumptions())


@pytest.mark.unit
def test_every_plan_adds_up() -> None:
    memory = _plan(2, PP2)
    assert memory.total == sum(memory.kinds().values())
    assert all(size >= 0 for size in memory.kinds().values())


@pytest.mark.unit
def test_the_distributed_optimizer_spreads_state_over_replicas() -> None:
    whole, spread = _plan(4), _plan(4, DISTRIBUTED)
    assert spread.optimizer == pytest.approx(whole.optimizer / 4, rel=1e-3)
    assert (spread.weights, spread.gradients) == (whole.weights, whole.gradients)


@pytest.mark.unit
def test_logits_only_where_the_loss_is_and_features_where_tokens_are_embedded() -> None:
    first, last = _plan(2, PP2), _plan(2, PP2, pp=1)
    assert first.logits == 0 < last.logits
    assert first.features > last.features > 0


@pytest.mark.unit
def test_pictures_grow_the_encoder_and_the_features_alone() -> None:
    none = _plan(2, assumptions=Assumptions(picture_tokens=0))
    some = _plan(2, assumptions=Assumptions(picture_tokens=64))
    more = _plan(2, assumptions=Assumptions(picture_tokens=128))
    assert (none.encoder, none.features) == (0, 0)
    assert more.encoder == pytest.approx(2 * some.encoder)
    assert more.features == 2 * some.features
    assert more.decoder == some.decoder
    # Rows of 256 tokens: half of each is the default.
    assert _plan(2).encoder == more.encoder


@pytest.mark.unit
def test_features_by_hand() -> None:
    # Two replicas of 2 rows with 100 picture tokens each, hidden 64 in bf16: the rank encodes
    # half of 400 tokens, and embeds 200 with their gradients.
    memory = _plan(2, assumptions=Assumptions(picture_tokens=100))
    assert memory.features == (200 + 2 * 200) * 64 * 2


@pytest.mark.unit
def test_text_alone() -> None:
    memory = _plan(1, "model.vision=null")
    assert (memory.encoder, memory.features) == (0, 0)


@pytest.mark.unit
def test_an_idle_encoder_recomputes_where_the_decoder_was() -> None:
    plain = _plan(1, "recompute.vision=full")
    # With next to no decoder the recomputed block is what stands highest.
    small = _plan(
        1,
        "recompute.vision=full",
        "recompute.language=full",
        "model.language.num_layers=2",
        "model.language.vocab_size=256",
        "training.global_batch_size=512",
    )
    per_row = plain.encoder / 8
    assert small.encoder > 512 * per_row


@pytest.mark.unit
def test_parallel_dimensions_divide_the_decoder() -> None:
    one = _plan(1)
    sequence = _plan(2, TP2)
    # Everything is split but the rotary table and the statistics of norms.
    assert 0.5 * one.decoder < sequence.decoder < 0.6 * one.decoder
    half = _plan(2, "parallel.context_parallel_size=2", "recompute.language=full")
    assert half.decoder < 0.7 * _plan(1, "recompute.language=full").decoder
    crowded = _plan(2, EP2, assumptions=Assumptions(expert_imbalance=2.0))
    assert crowded.decoder > _plan(2, EP2).decoder


@pytest.mark.unit
def test_hiding_the_all_to_all_holds_one_layer_more() -> None:
    plain = _plan(2, EP2)
    overlapped = _plan(2, EP2, "parallel.overlap_moe_expert_parallel_comm=true")
    assert 0 < overlapped.decoder - plain.decoder < plain.decoder / 2


@pytest.mark.unit
@pytest.mark.parametrize("tokens", [-1, 257])
def test_more_picture_tokens_than_a_row_has(tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"--picture-tokens {tokens}.*expected 0 to 256"):
        _plan(1, assumptions=Assumptions(picture_tokens=tokens))
