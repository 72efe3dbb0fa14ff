"""Frozen parts stay, and others train alike in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.layouts import LAYOUTS
from tests.training_case import differences, recipe, train_case


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("frozen", "name"),
    [
        ("[language]", "pp2_vpp2_ep2_overlap"),
        ("[vision]", "tp2_sp"),
        pytest.param("[vision,adapter]", "pp2_cp2_ep2", marks=pytest.mark.slow),
        pytest.param("[vision,language]", "dp2_mbs2", marks=pytest.mark.slow),
    ],
)
def test_frozen_parts(frozen: str, name: str, nano_data: Path, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    words = (f"training.freeze={frozen}", "training.train_iters=4")
    start = train_case(
        recipe(
            nano_data,
            tmp_path / "start",
            "training.train_iters=2",
            "optimizer.lr=1e-300",
            "model.language.moe_router_bias_update_rate=0",
        )
    )
    one = train_case(recipe(nano_data, tmp_path / "one", *words))
    run = train_case(
        recipe(nano_data, tmp_path / "run", *words, *layout.overrides), layout.world_size
    )
    assert max(differences(run, one).values()) < 1e-11
    prefixes = {"vision": "vision.trunk.", "adapter": "vision.adapter.", "language": "language."}
    parts = frozen.strip("[]").split(",")
    for part, prefix in prefixes.items():
        names = [key for key in one.parameters if key.startswith(prefix)]
        moved = [
            key
            for key in names
            if float((one.parameters[key] - start.parameters[key]).abs().max()) > 1e-12
        ]
        assert bool(moved) == (part not in parts), (part, moved[:3])


@pytest.mark.distributed
def test_balance_is_reported_at_no_weight(nano_data: Path, tmp_path: Path) -> None:
    """Balanced by the bias alone: the loss is still a measure, and trains nothing."""
    weights = ("0", "1e-12")
    runs = [
        train_case(
            recipe(
                nano_data,
                tmp_path / weight,
                "training.train_iters=2",
                f"model.language.moe_aux_loss_coeff={weight}",
            )
        )
        for weight in weights
    ]
    assert min(value or 0.0 for value in runs[0].balance) > 0.9
    assert max(differences(*runs).values()) < 1e-9
