"""Who keeps a run that does not move."""

from __future__ import annotations

import pytest

from megatron_vlm.resilience.hangs import Beat, culprits, find_hang

pytestmark = pytest.mark.unit

WAITS = Beat(7, 30, 12.0, "reduce", 0.5, True, "all_reduce in _largest (loop.py:1)")


def _beats(**others: Beat) -> dict[int, Beat]:
    return {rank: others.get(f"rank{rank}", WAITS) for rank in range(4)}


def test_moves() -> None:
    assert find_hang({}, 10, 100) is None
    assert find_hang(_beats(), 13, 100) is None
    assert find_hang(_beats(rank2=WAITS._replace(age=1.0)), 10, 100) is None


@pytest.mark.parametrize("phase", ["start", "save", "validate", ""])
def test_slow_phases_have_longer(phase: str) -> None:
    beats = _beats(rank1=WAITS._replace(phase=phase, age=90.0))
    assert find_hang(beats, 10, 100) is None
    old = {rank: beat._replace(age=101.0) for rank, beat in beats.items()}
    assert find_hang(old, 10, 100) is not None


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (WAITS._replace(look_age=9.0), "does not run"),
        (WAITS._replace(step=6), "still in step 6"),
        (WAITS._replace(waits=False, phase="data", place="read (io.py:3)"), "others wait"),
        (WAITS._replace(place="barrier in _largest (loop.py:1)"), "another collective"),
        (WAITS._replace(place="all_reduce in _other (loop.py:9)"), "waits elsewhere"),
    ],
)
def test_culprit(odd: Beat, why: str) -> None:
    hang = find_hang(_beats(rank2=odd), 10, 100)
    assert hang is not None and hang.culprits == (2,) and why in hang.why
    assert hang.seconds == 12.0


def test_a_collective_tells_more_than_a_place() -> None:
    """Rank 2 is in a collective of its own; the others have come to different lines meanwhile."""
    beats = _beats(
        rank1=WAITS._replace(place="all_reduce in train (loop.py:5)"),
        rank2=WAITS._replace(place="barrier in train (loop.py:5)"),
    )
    assert culprits(beats)[0] == (2,)


def test_nobody_is_accused_without_a_reason() -> None:
    assert culprits(_beats())[0] == ()
    half = WAITS._replace(place="barrier in _largest (loop.py:1)")
    assert culprits(_beats(rank0=half, rank1=half))[0] == ()
    frozen = {rank: WAITS._replace(look_age=9.0) for rank in range(4)}
    assert culprits(frozen)[0] == ()
