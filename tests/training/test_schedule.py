"""The learning rate of every step, against values worked out by hand."""

from __future__ import annotations

import pytest

from megatron_vlm.training.schedule import learning_rate
from tests.topology.words import config

pytestmark = pytest.mark.unit

CONSTANT = "optimizer.lr=0.4 warmup=4"
COSINE = "optimizer.lr=0.5 optimizer.min_lr=0.1 optimizer.lr_decay_style=cosine warmup=2"


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        # Linear from 0: the first step has a quarter of the peak, the fourth all of it.
        (CONSTANT, {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.4, 10: 0.4, 11: 0.4}),
        ("optimizer.lr=0.4 warmup=0", {1: 0.4, 10: 0.4}),
        # Eight steps of decay after two of warm-up: half way at 6, a quarter at 4.
        (COSINE, {1: 0.25, 2: 0.5, 4: 0.4414213562373095, 6: 0.3, 8: 0.1585786437626905, 10: 0.1}),
        # Stays at the end of the decay.
        (f"{COSINE} optimizer.lr_decay_iters=6", {2: 0.5, 4: 0.3, 6: 0.1, 7: 0.1, 10: 0.1}),
        # A decay longer than the run is not reached.
        (f"{COSINE} optimizer.lr_decay_iters=18", {10: 0.3, 18: 0.1}),
        # A decay that ends with the warm-up.
        (f"{COSINE} optimizer.lr_decay_iters=2", {1: 0.25, 2: 0.5, 3: 0.1}),
        ("optimizer.lr=0.5 optimizer.lr_decay_style=cosine warmup=0", {5: 0.25, 10: 0.0}),
    ],
)
def test_rates(text: str, rates: dict[int, float]) -> None:
    run = config(text)
    found = {iteration: learning_rate(run, iteration) for iteration in rates}
    assert found == pytest.approx(rates, rel=1e-12, abs=1e-15)


def test_never_rises_after_the_warmup() -> None:
    run = config(COSINE)
    rates = [learning_rate(run, iteration) for iteration in range(1, 30)]
    assert rates[:2] == sorted(rates[:2]) and rates[1:] == sorted(rates[1:], reverse=True)
