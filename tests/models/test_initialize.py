"""Initial weights depend on (seed, name, position) alone: no layout shows in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_vlm.platform import World, start_distributed, stop
from megatron_vlm.topology.layout import resolve_layout
from tests.ranks import run_ranks
from tests.topology.words import config
from tests.training_case import assemble, local_parts

pytestmark = pytest.mark.distributed

STDS = {"vision.adapter": 0.03, "vision": 0.01, "language": 0.05}
WORDS = " ".join(
    f"{field}.init_method_std={std}"
    for field, std in (
        ("model.adapter", STDS["vision.adapter"]),
        ("model.vision", STDS["vision"]),
        ("model.language", STDS["language"]),
    )
)


def _initial(world: World, text: str, seed: int) -> tuple[list[Any], int]:
    from megatron_vlm.models.initialize import count_parameters, initialize
    from megatron_vlm.models.vlm import build_model
    from megatron_vlm.topology.mesh import build_topology, destroy_topology

    run = config(f"{WORDS} {text}")
    layout = resolve_layout(run, world.world_size)
    model = build_model(run, build_topology(layout, start_distributed(world)))
    with torch.no_grad():
        for entry in model.sharded_state_dict().values():
            entry.data.fill_(-7.0)
    initialize(model.sharded_state_dict(), run.model, seed)
    state = model.sharded_state_dict()
    parts, total = local_parts(state), count_parameters(state)
    destroy_topology()
    stop()
    return parts, total


def _weights(text: str, world_size: int = 1, seed: int = 7) -> dict[str, torch.Tensor]:
    return assemble([parts for parts, _ in run_ranks(world_size, _initial, text, seed)])


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    """The weights of one process, in float32."""
    return _weights("precision=fp32")


@pytest.mark.parametrize(
    ("text", "world_size"),
    [
        ("tp=2", 2),
        ("pp=2", 2),
        ("ep=2", 2),
        ("tp=2 ep=2 etp=2", 4),
        ("pp=2 vpp=2 stages=Et|t|tt|L ep=2", 4),
        ("tp=4", 4),
    ],
)
def test_assembled_shards_equal_one_process(
    alone: dict[str, torch.Tensor], text: str, world_size: int
) -> None:
    found = _weights(f"precision=fp32 {text}", world_size)
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value), name


def test_other_precisions_start_from_the_same_numbers(alone: dict[str, torch.Tensor]) -> None:
    for precision, dtype in (("fp64", torch.float64), ("bf16", torch.bfloat16)):
        found = _weights(f"precision={precision}")
        for name, value in alone.items():
            # Buffers keep the precision that they need.
            assert found[name].dtype == (torch.float32 if "expert_bias" in name else dtype)
            assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_seed_and_name_decide(alone: dict[str, torch.Tensor]) -> None:
    assert all(
        torch.equal(value, alone[name]) for name, value in _weights("precision=fp32").items()
    )
    other = _weights("precision=fp32", seed=8)
    drawn = {name: value for name, value in alone.items() if _kind(name) == "drawn"}
    assert len(drawn) > 20
    firsts = set()
    for name, value in drawn.items():
        assert not torch.equal(other[name], value), name
        # No number is drawn twice: not for another seed, name or row.
        rows = value.reshape(-1, value.size(-1))
        for source in (rows, other[name].reshape(rows.shape)):
            starts = [tuple(row) for row in source[:, :4].tolist()]
            assert firsts.isdisjoint(starts) and len(set(starts)) == len(starts), name
            firsts.update(starts)


def _kind(name: str) -> str:
    if name.endswith("bias"):
        return "zero"
    return "one" if "norm" in name else "drawn"


def test_values(alone: dict[str, torch.Tensor]) -> None:
    kinds = set()
    for name, value in alone.items():
        kinds.add(_kind(name))
        if _kind(name) == "zero":
            assert bool((value == 0).all()), name
        elif _kind(name) == "one":
            assert bool((value == 1).all()), name
        else:
            std = next(std for part, std in STDS.items() if name.startswith(part))
            count = value.numel()
            # Five standard errors of the mean and of the deviation of a normal sample.
            assert abs(float(value.mean())) < 5 * std / math.sqrt(count), name
            assert abs(float(value.std()) / std - 1) < 5 / math.sqrt(2 * count), name
            # Normal, not uniform: kurtosis 3 (uniform has 1.8).
            kurtosis = float(((value / std) ** 4).mean())
            assert abs(kurtosis - 3) < 5 * math.sqrt(96 / count), name
    assert kinds == {"zero", "one", "drawn"}
    assert {"language.embedding.word_embeddings.weight", "vision.adapter.fc1.bias"} <= set(alone)


def test_parameter_count(alone: dict[str, torch.Tensor]) -> None:
    ((_, total),) = run_ranks(1, _initial, "", 7)
    assert total == sum(value.numel() for value in alone.values())
