"""Whether a run that has failed is started again, when, and without which nodes."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

_LONGEST_WAIT = 60.0


class Failure(NamedTuple):
    """Why an attempt ended."""

    cause: str
    """`rank died`, `hang`, `node lost` or `could not start`."""
    step: int
    """The highest that any rank had begun; 0 before the first."""
    signature: str
    """What the same fault says again: an error's text without its numbers."""
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()


class Decision(NamedTuple):
    """What is done about it."""

    wait: float
    """Seconds until the next attempt."""
    give_up: str | None = None
    """The diagnosis, where there will be none."""
    avoid: tuple[str, ...] = ()
    """Nodes that have failed too often, to be left out where there are others."""


class RestartPolicy:
    """Remembers a run's failures."""

    def __init__(self, max_restarts: int, crash_loop: int, node_faults: int = 2) -> None:
        """For one job.

        Args:
            max_restarts: in a row without the run getting further than ever before.
            crash_loop: failures with the same error at the same step that end it.
            node_faults: of one node, after which it is avoided.
        """
        self._max, self._loop, self._node_limit = max_restarts, crash_loop, node_faults
        self._furthest = 0
        self._in_a_row = 0
        self._same: list[Failure] = []
        self._faults: Counter[str] = Counter()

    def decide(self, failure: Failure) -> Decision:
        """What to do after a failure."""
        if failure.step > self._furthest:
            self._furthest, self._in_a_row = failure.step, 0
        self._in_a_row += 1
        key = failure.step, failure.signature
        self._same = [f for f in self._same if (f.step, f.signature) == key]
        self._same.append(failure)
        own_error = failure.cause == "rank died" and failure.signature
        if own_error and len(self._same) >= self._loop:
            return Decision(0.0, self._diagnosis(failure))
        if self._in_a_row > self._max:
            return Decision(
                0.0,
                f"{self._in_a_row} failures in a row without getting beyond step {self._furthest} "
                f"(resilience.max_restarts {self._max}); the last: {failure.cause}"
                f"{': ' if failure.signature else ''}{failure.signature}",
            )
        self._faults.update(set(failure.nodes))
        avoid = tuple(n for n, count in self._faults.items() if count >= self._node_limit)
        wait = 0.0 if self._in_a_row < 2 else min(_LONGEST_WAIT, 2.0 ** (self._in_a_row - 2))
        return Decision(wait, avoid=avoid)

    def _diagnosis(self, failure: Failure) -> str:
        times = len(self._same)
        nodes = sorted({node for f in self._same for node in f.nodes})
        ranks = sorted({rank for f in self._same for rank in f.ranks})
        if len(nodes) == 1:
            where = f"always on {nodes[0]}: look at that node"
        else:
            where = f"on {', '.join(nodes)}: not one node's fault, look at the code or the data"
        told = ", ".join(map(str, ranks))
        return (
            f"the same error {times} times at step {failure.step} (rank{'s' * (len(ranks) > 1)} "
            f"{told}, {where}): {failure.signature}"
        )


def signature(lines: list[str], status: int) -> str:
    """What is the same whenever the same fault ends a rank; empty where it said nothing itself.

    Args:
        lines: the end of its output.
        status: how it ended; negative for a signal.
    """
    if status in (-9, -15):  # From outside: what it had said before has nothing to do with it.
        return ""
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    said = re.sub(r"0x[0-9a-f]+|\d+", "#", said)
    return said[:300] or f"status {status}"
