"""Mixtures: shares held to within a sample at any moment, and schedules."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.data.mixture import Phase, Weights, next_draws, phases

pytestmark = pytest.mark.unit


def drawn(rate: list[float], count: int, at_once: int, left: list[int | None]) -> list[int]:
    """The first draws, asked for a few at a time."""
    done = [0] * len(rate)
    found: list[int] = []
    while len(found) < count:
        room = [None if most is None else most - d for most, d in zip(left, done, strict=True)]
        order = next_draws(rate, done, room, at_once).tolist()
        if not order:
            break
        for source in order:
            done[source] += 1
        found += order
    return found[:count]


def test_an_order_by_hand() -> None:
    # Keys of a: 1/4, 3/4, 5/4, 7/4; of b: 1/2, 3/2; of c, with a rate of 1/2: 1, 3.
    assert drawn([2.0, 1.0, 0.5], 7, 100, [None] * 3) == [0, 1, 0, 2, 0, 1, 0]
    # Equal keys: the earlier source first.
    assert drawn([1.0, 1.0], 4, 100, [None] * 2) == [0, 1, 0, 1]
    assert drawn([0.0, 3.0], 3, 100, [None] * 2) == [1, 1, 1]


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_shares_hold_at_every_moment_and_for_any_way_of_asking(at_once: int) -> None:
    rate = [0.5, 3.0, 1.7, 0.01]
    found = drawn(rate, 600, at_once, [None] * 4)
    assert found == drawn(rate, 600, 77, [None] * 4)
    share = np.array(rate) / sum(rate)
    counts = np.zeros(4)
    for number, source in enumerate(found, 1):
        counts[source] += 1
        assert np.abs(counts - number * share).max() < 1.5


def test_sources_of_rates_like_their_sizes_end_their_epochs_together() -> None:
    sizes = [7, 100, 33]
    found = drawn([float(size) for size in sizes], 3 * sum(sizes), 50, [None] * 3)
    for epoch in range(3):
        part = found[epoch * sum(sizes) : (epoch + 1) * sum(sizes)]
        assert np.bincount(part).tolist() == sizes


def test_a_source_that_ends_leaves_the_others_their_shares() -> None:
    found = drawn([1.0, 1.0, 2.0], 1000, 9, [10, None, None])
    assert found.count(0) == 10
    after = found[len(found) - 1 - found[::-1].index(0) :]
    assert abs(after.count(2) - 2 * after.count(1)) <= 3
    assert drawn([1.0, 1.0], 1000, 9, [4, 3]).count(1) == 3
    assert len(drawn([1.0, 1.0], 1000, 9, [4, 3])) == 7
    assert drawn([1.0, 0.0], 10, 4, [0, None]) == []


def test_shares_of_tokens_become_rates_of_draws() -> None:
    found = phases([Weights(0, (3.0, 1.0))], "tokens", [30.0, 5.0])
    assert found == [Phase(0, (0.75 / 30, 0.25 / 5))]
    assert phases([Weights(0, (3.0, 1.0))], "samples", [30.0, 5.0]) == [Phase(0, (0.75, 0.25))]


def test_a_schedule_switches_and_ramps() -> None:
    schedule = [Weights(0, (1.0, 1.0)), Weights(100, (1.0, 3.0)), Weights(1000, (0.0, 1.0), 320)]
    found = phases(schedule, "samples", [1.0, 1.0])
    assert found[:2] == [Phase(0, (0.5, 0.5)), Phase(100, (0.25, 0.75))]
    ramp = found[2:]
    assert [phase.from_tokens for phase in ramp] == list(range(1000, 1320, 10))
    assert [phase.rate[0] for phase in ramp] == pytest.approx(
        [0.25 * (1 - step / 32) for step in range(1, 33)]
    )
    # A ramp that the next point cuts off.
    cut = phases([Weights(0, (1.0, 1.0)), Weights(10, (0.0, 1.0), 64), Weights(20, (1.0, 0.0))],
                 "samples", [1.0, 1.0])  # fmt: skip
    assert [phase.from_tokens for phase in cut] == [0, 10, 12, 14, 16, 18, 20]
    assert cut[-1].rate == (1.0, 0.0)
