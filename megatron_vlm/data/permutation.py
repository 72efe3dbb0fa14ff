"""A pseudo-random order of any length that is computed entry by entry and never stored.

A Feistel network over the pairs (left, right) with left < a and right < b, where a * b is barely
more than the length: each round adds to one half a hash of the other, modulo that half's range,
which can be undone and therefore permutes the pairs. A result beyond the length is sent through
again until it lies within ("cycle walking"), which keeps it a permutation and costs next to nothing
here, since few pairs lie beyond.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_ROUNDS_OF_FEW = 40
_FEW = 4096
# A round mixes little where a half has only a few values: 8 rounds over 5 things gave some of their
# 120 orders twice as often as others.
_MASK = (1 << 64) - 1


class Permutation:
    """An order of `length` things, drawn from a seed."""

    def __init__(self, length: int, *key: int) -> None:
        """Prepare the order.

        Args:
            length: things to order.
            key: integers that select the order; another key gives an unrelated one.
        """
        if length < 1:
            raise ValueError(f"length {length}: expected at least 1")
        self.length = length
        self._left = max(math.isqrt(length - 1) + 1, 1)
        self._right = -(-length // self._left)
        rounds = _ROUNDS_OF_FEW if length <= _FEW else _ROUNDS
        state = 0x9E3779B97F4A7C15
        for word in key:
            state = _mix_one(state ^ _mix_one(word & _MASK))
        self._round_keys = [_mix_one(state + number) for number in range(1, rounds + 1)]

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at `places`.

        Args:
            places: int64 [n], each from 0 to below `length`.

        Returns:
            int64 [n], each from 0 to below `length`; distinct places give distinct results.
        """
        found = self._encrypt(places.astype(np.uint64))
        beyond = np.flatnonzero(found >= self.length)
        while beyond.size:
            found[beyond] = self._encrypt(found[beyond])
            beyond = beyond[found[beyond] >= self.length]
        return found.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        width = np.uint64(self._right)
        left, right = np.divmod(values, width)
        for number, key in enumerate(self._round_keys):
            if number % 2:
                right = (right + _mix(left, key)) % width
            else:
                left = (left + _mix(right, key)) % np.uint64(self._left)
        return left * width + right


def _mix(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A hash of each value, below 2**32 so that it can be added to any half without overflow."""
    mixed = values + np.uint64(key)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(32)


def _mix_one(value: int) -> int:
    """The finaliser of splitmix64 on one Python integer; all 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
