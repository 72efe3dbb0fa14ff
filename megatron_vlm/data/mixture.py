"""Which source is drawn from next: weights, their schedule, and exact epochs.

Within a phase of constant weights, draw j of a source (from 0) has the key (j + 1/2) / rate, and
all sources are merged in the order of their keys. So after any number of draws each source has had
its share to within one sample, no stream of random numbers decides anything, and the next draws
follow from how many each source has had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_RAMP_STEPS = 32
"""Steps in which weights move from one point of the schedule to the next. Our choice."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that hold from a number of drawn tokens on."""

    from_tokens: int
    weight: tuple[float, ...]
    """Of each source; relative."""
    ramp_tokens: int = 0
    """Reached linearly over so many tokens from `from_tokens` on."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of constant rates."""

    from_tokens: int
    rate: tuple[float, ...]
    """Draws of each source, relative; 0: none."""


def phases(
    schedule: Sequence[Weights], unit: Literal["tokens", "samples"], mean_tokens: Sequence[float]
) -> list[Phase]:
    """The stretches of constant rates that a schedule consists of.

    Args:
        schedule: ascending; the first from token 0 and without a ramp.
        unit: whether weights are shares of the tokens or of the samples.
        mean_tokens: of a draw, of each source: what turns shares of tokens into rates of draws.
    """
    found: list[Phase] = []
    before = schedule[0].weight
    for number, point in enumerate(schedule):
        steps = _RAMP_STEPS if point.ramp_tokens else 1
        end = schedule[number + 1].from_tokens if number + 1 < len(schedule) else None
        for step in range(1, steps + 1):
            start = point.from_tokens + (step - 1) * point.ramp_tokens // steps
            if end is not None and start >= end:
                break
            weight = [
                (old / sum(before)) * (1 - step / steps) + (new / sum(point.weight)) * step / steps
                for old, new in zip(before, point.weight, strict=True)
            ]
            if unit == "tokens":
                weight = [w / mean for w, mean in zip(weight, mean_tokens, strict=True)]
            found.append(Phase(start, tuple(weight)))
        before = point.weight
    return found


def next_draws(
    rate: Sequence[float], done: Sequence[int], left: Sequence[int | None], count: int
) -> NDArray[np.int64]:
    """The sources of the next draws of a phase.

    Args:
        rate: of each source.
        done: draws that each has had within the phase.
        left: draws that each still has; null: endless.
        count: draws wanted.

    Returns:
        int64 [n], n about `count`, less only where the sources end; the order of draws does not
        depend on how many are asked for at once.
    """
    total = sum(r for r, more in zip(rate, left, strict=True) if more is None or more > 0)
    keys, sources, complete_to = [], [], np.inf
    for source, (r, first, more) in enumerate(zip(rate, done, left, strict=True)):
        if r == 0 or more == 0:
            continue
        wanted = int(count * r / total) + 2
        if more is not None and more <= wanted:
            wanted = more
        # Division by a rate is exactly rounded everywhere, so every machine finds the same order.
        found = (np.arange(first, first + wanted) + 0.5) / r
        if wanted != more:
            complete_to = min(complete_to, float(found[-1]))
        keys.append(found)
        sources.append(np.full(wanted, source, np.int64))
    if not keys:
        return np.zeros(0, np.int64)
    joined = np.concatenate(keys)
    order = np.argsort(joined, kind="stable")
    # Beyond the last key of any source, its next draw might come first.
    order = order[: np.searchsorted(joined[order], complete_to, side="right")]
    return np.concatenate(sources)[order]
