"""The optimizer's step against AdamW written out, and the global norm against a plain sum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.driver import with_run
from tests.training_case import recipe

pytestmark = pytest.mark.distributed

LR, WEIGHT_DECAY, BETAS, EPSILON = 0.01, 0.2, (0.8, 0.9), 1e-7
WORDS = (
    "training.train_iters=3",
    "training.global_batch_size=2",
    f"optimizer.lr={LR}",
    "optimizer.lr_warmup_iters=0",
    f"optimizer.weight_decay={WEIGHT_DECAY}",
    f"optimizer.adam_beta1={BETAS[0]}",
    f"optimizer.adam_beta2={BETAS[1]}",
    f"optimizer.adam_eps={EPSILON}",
)


def _parameters(run: Any) -> dict[str, torch.nn.Parameter]:
    state = run.step.model.sharded_state_dict()
    return {
        name: entry.data
        for name, entry in state.items()
        if isinstance(entry.data, torch.nn.Parameter) and entry.data.requires_grad
    }


def _record(run: Any) -> list[dict[str, Any]]:
    """Weights before, gradients, the norm that was reported, and weights after each step."""
    steps: list[dict[str, Any]] = []
    real = run.trainable.step

    def step(learning_rate: float, clip_grad: float) -> float:
        parameters = _parameters(run)
        # The engine's buffers: what is left after reduction, before clipping.
        entry: dict[str, Any] = {
            "before": {name: p.detach().clone() for name, p in parameters.items()},
            "gradients": {
                name: p.main_grad.detach().clone()  # type: ignore[attr-defined]
                for name, p in parameters.items()
            },
        }
        entry["norm"] = real(learning_rate, clip_grad)
        run.trainable.gather_parameters()
        entry["after"] = {name: p.detach().clone() for name, p in parameters.items()}
        steps.append(entry)
        return entry["norm"]

    run.trainable.step = step
    run.held_out = {}
    run.run()
    return steps


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (("optimizer.clip_grad=0.5",), 1e-11),
        (("optimizer.clip_grad=0",), 1e-11),
        (
            (
                "optimizer.clip_grad=0.5",
                "training.precision=fp32",
                "optimizer.use_distributed_optimizer=true",
            ),
            2e-5,
        ),
    ],
    ids=["clipped", "unclipped", "distributed_optimizer"],
)
def test_adamw_by_hand(
    nano_data: Path, tmp_path: Path, words: tuple[str, ...], limit: float
) -> None:
    """Decoupled decay on matrices alone, bias-corrected moments, one norm over both towers."""
    run_config = recipe(nano_data, tmp_path, *WORDS, *words)
    clip = run_config.optimizer.clip_grad
    (steps,) = with_run(run_config, _record)
    assert len(steps) == 3
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    kinds = set()
    for number, step in enumerate(steps, start=1):
        assert {name.split(".")[0] for name in step["gradients"]} == {"language", "vision"}
        squares = sum(float((g.double() ** 2).sum()) for g in step["gradients"].values())
        norm = math.sqrt(squares)
        assert step["norm"] == pytest.approx(norm, rel=10 * limit)
        assert norm > 0.5, "else clipping is not seen"
        factor = min(1.0, clip / norm) if clip else 1.0
        for name, gradient in step["gradients"].items():
            g = gradient.double() * factor
            m = first[name] = BETAS[0] * first.get(name, 0) + (1 - BETAS[0]) * g
            v = second[name] = BETAS[1] * second.get(name, 0) + (1 - BETAS[1]) * g * g
            before = step["before"][name].double()
            decays = before.dim() > 1
            kinds.add((decays, "norm" in name or name.endswith("bias")))
            move = (m / (1 - BETAS[0] ** number)) / (
                (v / (1 - BETAS[1] ** number)).sqrt() + EPSILON
            )
            expected = before - LR * (move + (WEIGHT_DECAY * before if decays else 0))
            after = step["after"][name].double()
            assert float((after - expected).abs().max()) < limit * 10, name
    # Norms and biases, and only they, have no decay.
    assert kinds == {(True, False), (False, True)}
