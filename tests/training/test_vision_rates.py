"""The encoder's own learning rate, and its decay with depth, as each weight's first step shows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.nano_data import build_nano_data
from tests.parallel.layouts import LAYOUTS
from tests.training_case import Outcome, differences, recipe, train_case

pytestmark = pytest.mark.distributed

RATES = ("optimizer.vision_lr=6.0e-4", "optimizer.vision_layer_decay=0.5")
"""A fifth of the decoder's, halved with each layer from the top."""


@pytest.fixture(scope="module")
def nano_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_nano_data(tmp_path_factory.mktemp("nano"))


def trained(data: Path, folder: Path, *words: str, ranks: int = 1) -> Outcome:
    return train_case(recipe(data, folder, *words), ranks)


def depth(name: str, layers: int) -> int:
    """Layers between a weight of the trunk and its last norm."""
    if "patch_embed" in name:
        return layers + 1
    if "blocks." in name:
        return layers - int(name.split("blocks.")[1].split(".")[0])
    return 0


def test_the_first_step_of_every_weight(nano_data: Path, tmp_path: Path) -> None:
    """AdamW's first step is in proportion to the rate, decay of weights included."""
    still = ("training.train_iters=1", "optimizer.lr_warmup_iters=0")
    # So small a rate that the weights are as they were made.
    start = trained(nano_data, tmp_path / "start", *still, "optimizer.lr=1.0e-30").parameters
    plain = trained(nano_data, tmp_path / "plain", *still).parameters
    slow = trained(nano_data, tmp_path / "slow", *still, *RATES).parameters
    depths = set()
    for name, before in start.items():
        whole, part = plain[name] - before, slow[name] - before
        rate = 1.0
        if "trunk." in name:
            depths.add(depth(name, 2))
            rate = 0.2 * 0.5 ** depth(name, 2)
        assert torch.allclose(part, rate * whole, rtol=1e-6, atol=1e-15), name
        assert "router.expert_bias" in name or whole.abs().max() > 0, name
    assert depths == {0, 1, 2, 3}


@pytest.mark.parametrize("layout", ["dp2", "tp2_pp2_ep2"])
def test_alike_in_every_layout(layout: str, nano_data: Path, tmp_path: Path) -> None:
    ranks, overrides, *_ = LAYOUTS[layout]
    one = trained(nano_data, tmp_path / "one", *RATES)
    run = trained(nano_data, tmp_path / "run", *RATES, *overrides, ranks=ranks)
    assert max(differences(run, one).values()) < 1e-11


def test_sharded_optimizers_keep_to_the_rates(nano_data: Path, tmp_path: Path) -> None:
    words = (*RATES, "training.precision=fp32")
    one = trained(nano_data, tmp_path / "one", *words)
    sharded = trained(
        nano_data, tmp_path / "run", *words, "optimizer.use_distributed_optimizer=true", ranks=2
    )
    assert math.isclose(one.losses[-1], sharded.losses[-1], rel_tol=1e-4)
    for name, whole in one.parameters.items():
        if "trunk." in name:
            assert torch.allclose(sharded.parameters[name], whole, atol=2e-5), name
