"""Which ranks hold a run up: found in what all ranks told last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

SLOW_PHASES = frozenset({"", "start", "load", "save", "validate"})
"""Phases whose length is not that of a part of a step."""

_FROZEN_SECONDS = 6.0
"""A rank whose main thread was not looked at for so long does not run at all, or holds the
interpreter's lock."""


class Beat(NamedTuple):
    """What one rank told, as its agent passed it on."""

    step: int
    entered: int
    """Phases entered since the start."""
    age: float
    """Seconds since the last was entered."""
    phase: str
    look_age: float
    """Seconds since its main thread was last looked at."""
    waits: bool
    place: str


class Hang(NamedTuple):
    """A run that does not move."""

    seconds: float
    """Since any rank entered a phase."""
    culprits: tuple[int, ...]
    """Ranks that the others wait for; empty where that cannot be told."""
    why: str
    """How they are told from the others."""


def find_hang(beats: Mapping[int, Beat], step_seconds: float, slow_seconds: float) -> Hang | None:
    """Whether no rank has moved for too long, and who then keeps the others.

    Ranks of one run wait for each other in every step: when one stays behind all stop soon.

    Args:
        beats: of every rank.
        step_seconds: allowed without any rank entering a phase.
        slow_seconds: the same while any is in one of `SLOW_PHASES`.
    """
    if not beats:
        return None
    slow = any(beat.phase in SLOW_PHASES for beat in beats.values())
    still = min(beat.age for beat in beats.values())
    if still <= (slow_seconds if slow else step_seconds):
        return None
    return Hang(still, *culprits(beats))


def culprits(beats: Mapping[int, Beat]) -> tuple[tuple[int, ...], str]:
    """Ranks that the others wait for, and how that is known."""
    told = list(beats.values())
    frozen = [rank for rank, beat in beats.items() if beat.look_age > _FROZEN_SECONDS]
    if frozen and len(frozen) < len(beats):
        return tuple(frozen), "the process does not run"
    behind = min(beat.step for beat in told)
    late = [rank for rank, beat in beats.items() if beat.step == behind]
    if len(late) < len(beats):
        return tuple(late), f"still in step {behind}, others are further"
    busy = [rank for rank, beat in beats.items() if not beat.waits and beat.phase != "wait"]
    if busy and len(busy) < len(beats):
        return tuple(busy), "all others wait for ranks"
    # A collective that others are not in keeps its rank for ever, wherever they are by then.
    for what, key in (
        ("in another collective than the others", [b.place.partition(" in ")[0] for b in told]),
        ("waits elsewhere than the others", [b.place for b in told]),
    ):
        (odd, count), *others = Counter(key).most_common()[::-1]
        if others and count < len(told) / 2 and (len(others) < 2 or others[0][1] > count):
            return tuple(r for r, place in zip(beats, key, strict=True) if place == odd), what
    return (), "all ranks wait, and none in another place than most"
