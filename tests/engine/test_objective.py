"""Objectives: the registry, and sums over segments that context-parallel ranks share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vlm.errors import ConfigError
from megatron_vlm.platform import World, start_distributed, stop
from tests.ranks import run_ranks

LENGTHS = (8, 16, 8, 24)


@pytest.mark.unit
def test_unknown_objective() -> None:
    from megatron_vlm.engine.objective import build_objective

    with pytest.raises(ConfigError) as caught:
        build_objective("next_tokens", None, None)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "training.objective 'next_tokens'" in message and "next_token" in message
    assert "\n" not in message


@pytest.mark.unit
def test_registered_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vlm.engine import objective

    monkeypatch.setattr(objective, "_REGISTRY", dict(objective._REGISTRY))

    class Mine(objective.NextToken):
        """A person's own."""

    objective.register_objective("mine", Mine)
    topology: Any = SimpleNamespace()
    model: Any = SimpleNamespace(language=SimpleNamespace(mtp_num_layers=None))
    built = objective.build_objective("mine", topology, model)
    assert type(built) is Mine and built.topology is topology
    assert type(objective.build_objective("next_token", topology, model)) is objective.NextToken
    with pytest.raises(ConfigError, match="next_token.*mine"):
        objective.build_objective("other", topology, model)


@pytest.mark.unit
def test_next_token_sums_answers_alone() -> None:
    from megatron_vlm.engine.objective import NextToken

    torch.manual_seed(0)
    logits = torch.randn(1, 6, 5, dtype=torch.float64)
    labels = torch.tensor([[0, 4, 2, 1, 1, 3]])
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    batch: Any = SimpleNamespace(labels=labels, loss_mask=mask, ahead=None)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    topology: Any = SimpleNamespace(language=SimpleNamespace(tp=group))
    model: Any = SimpleNamespace(language=SimpleNamespace(mtp_num_layers=None))
    objective = NextToken(topology, model)
    expected = sum(
        -float(logits[0, i, labels[0, i]] - np.log(sum(np.exp(float(x)) for x in logits[0, i])))
        for i in (0, 2, 3)
    )
    assert float(objective.losses(logits, batch)["lm_loss"]) == pytest.approx(expected, rel=1e-12)
    assert float(objective.counts(batch)["lm_loss"]) == 3


def _segments(world: World, values: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One rank's part of loss(sums) + sum of its own tokens' losses."""
    from megatron_vlm.engine.objective import counted_once, segment_sums
    from megatron_vlm.engine.zigzag import local_tokens

    start_distributed(world)
    bounds = np.concatenate(([0], np.cumsum(LENGTHS)))
    mine = torch.from_numpy(local_tokens(bounds, world.world_size, world.rank))
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    topology: Any = SimpleNamespace(
        layout=SimpleNamespace(cp=world.world_size),
        language=SimpleNamespace(cp=dist.group.WORLD),
        coordinates=SimpleNamespace(cp=world.rank),
    )
    batch: Any = SimpleNamespace(num_segments=len(LENGTHS), segment_ids=ids[mine])
    local = values[:, mine].clone().requires_grad_()
    sums = segment_sums(local, batch, topology)
    # A loss of whole segments, which every rank computes alike, and one of single tokens.
    loss = counted_once((sums.sigmoid() * weight).sum(), topology) + (local**2).sum()
    loss.backward()
    assert local.grad is not None
    result = {"index": mine, "gradient": local.grad, "sums": sums.detach(), "loss": loss.detach()}
    stop()
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_segment_sums_and_losses_counted_once(cp: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(1, sum(LENGTHS), dtype=torch.float64) / 4
    weight = torch.randn(len(LENGTHS), dtype=torch.float64)
    whole = values.clone().requires_grad_()
    sums = torch.stack([part.sum() for part in whole.split(LENGTHS, dim=1)])
    loss = (sums.sigmoid() * weight).sum() + (whole**2).sum()
    loss.backward()
    assert whole.grad is not None
    ranks = run_ranks(cp, _segments, values, weight)
    gradient = torch.full_like(values, float("nan"))
    for found in ranks:
        assert torch.allclose(found["sums"], sums.detach(), atol=1e-14)
        gradient[:, found["index"]] = found["gradient"]
    assert torch.allclose(gradient, whole.grad, atol=1e-14)
    total = sum(float(found["loss"]) for found in ranks)
    assert total == pytest.approx(float(loss.detach()), rel=1e-14)
