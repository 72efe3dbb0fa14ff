"""One start of a run's ranks: where they are, how they end, and what that means."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vlm.resilience import attempts
from megatron_vlm.resilience.hangs import Beat, Hang
from megatron_vlm.resilience.policy import Failure, signature

USER_ERROR = 2
_PEER_SECONDS = 2.0
"""After a rank has failed, for others to say why; the first error is often not the first seen."""
_CALLS = 8
"""Of a stack that are told."""


@dataclass
class Ended:
    """A rank that has ended."""

    rank: int
    node: str
    status: int
    """Negative for a signal."""
    step: int
    phase: str
    lines: list[str]
    """The last that it said."""


class Outcome(NamedTuple):
    """How a supervisor's work ended."""

    kind: str
    """`finished`, `stopped` (saved, when asked to), `refused` (wrong input), `gave up` or
    `no nodes`."""
    why: str = ""
    avoid: tuple[str, ...] = ()
    """Nodes that the next job should keep off."""


@dataclass
class Attempt:
    """Ranks in order over `nodes`, so many on each."""

    number: int
    nodes: list[str]
    ranks_per_node: int
    run_dir: Path
    ended: dict[int, Ended] = field(default_factory=dict)
    asked_to_stop: bool = False
    reached: int = 0
    """The highest step that a rank told to have begun."""
    _first_failed_at: float | None = None

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return len(self.nodes) * self.ranks_per_node

    @property
    def furthest(self) -> int:
        """The highest step that any rank has begun; 0 before the first."""
        return max([self.reached, *(rank.step for rank in self.ended.values())])

    def node_of(self, rank: int) -> str:
        """Where a rank runs."""
        return self.nodes[rank // self.ranks_per_node]

    def ranks_of(self, nodes: Sequence[str]) -> tuple[int, ...]:
        """The ranks of some nodes."""
        return tuple(rank for rank in range(self.world_size) if self.node_of(rank) in nodes)

    def ranks_on(self, place: int, address: str, port: int) -> list[dict[str, Any]]:
        """What the agent of the node at `place` needs to start its ranks.

        Args:
            place: of the node, in the order of `nodes`.
            address: of rank 0, where all ranks meet.
            port: there.
        """
        found = []
        for local in range(self.ranks_per_node):
            rank = place * self.ranks_per_node + local
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(local),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "MVLM_OWN_OUTPUT": "1",
                attempts.VARIABLE: str(self.number),
            }
            output = self.run_dir / "logs" / f"rank_{rank:05d}.out"
            found.append({
                "rank": rank,
                "environment": environment,
                "output": str(output),
                "stacks": str(self.stacks(rank)),
            })  # fmt: skip
        return found

    def verdict(self, now: float) -> Outcome | Failure | None:
        """What the ranks that have ended mean, once that can be told."""
        failed = [rank for rank in self.ended.values() if rank.status != 0]
        everyone = len(self.ended) == self.world_size
        if not failed:
            return self._all_left() if everyone else None
        if self._first_failed_at is None:
            self._first_failed_at = now
        if not everyone and now - self._first_failed_at < _PEER_SECONDS:
            return None
        # Wrong input on one rank breaks the connections of the others, which may end before it.
        misled = [rank for rank in failed if rank.status == USER_ERROR]
        if misled:
            said = [line for line in misled[0].lines if "error" in line]
            return Outcome("refused", said[-1] if said else "wrong input")
        first = self.first_failed()
        if first.status in (-signal.SIGTERM, -signal.SIGUSR1) and self.asked_to_stop:
            return Outcome("stopped", "before the run could save")
        text = signature(first.lines, first.status)
        return Failure("rank died", self.furthest, text, (first.rank,), (first.node,))

    def first_failed(self) -> Ended:
        """The rank that made the others fail."""
        failed = [rank for rank in self.ended.values() if rank.status != 0]
        # One that was killed by a signal did; else the one that ended first.
        return min(failed, key=lambda rank: rank.status > 0)

    def _all_left(self) -> Outcome | Failure:
        if (self.run_dir / attempts.FINISHED).exists():
            return Outcome("finished")
        if self.asked_to_stop:
            return Outcome("stopped", f"saved at step {self.furthest}")
        return Failure("rank died", self.furthest, "ended before the last step")

    def left_alone(self) -> Failure:
        """What a hang means of which some ranks have left as if the run had ended."""
        gone = tuple(sorted(self.ended))
        nodes = tuple(sorted({self.ended[rank].node for rank in gone}))
        said = "left as if the run had ended, others wait"
        return Failure("rank died", self.furthest, said, gone, nodes)

    def hung(self, hang: Hang, beats: Mapping[int, Beat]) -> tuple[Failure, dict[str, Any]]:
        """What a hang means, and what is told of it; stacks have been written by now."""
        culprits = [
            {
                "rank": rank,
                "node": self.node_of(rank),
                "step": beats[rank].step,
                "phase": beats[rank].phase,
                "place": beats[rank].place,
                "stack": self._read_stack(rank),
            }
            for rank in hang.culprits
        ]
        where: dict[str, list[int]] = {}
        for rank, beat in sorted(beats.items()):
            waits = ", waits" if beat.waits else ""
            where.setdefault(f"step {beat.step} {beat.phase}{waits}: {beat.place}", []).append(rank)
        told = {
            "still_s": round(hang.seconds, 1),
            "culprits": culprits,
            "why": hang.why,
            "where": where,
            "stacks": str(self.stacks(0).parent),
        }
        nodes = tuple(sorted({self.node_of(rank) for rank in hang.culprits}))
        places = sorted(f"{beats[rank].phase} {beats[rank].place}" for rank in hang.culprits)
        text = places[0] if places else ""
        return Failure("hang", self.furthest, text, hang.culprits, nodes), told

    def stacks(self, rank: int) -> Path:
        """The file into which a rank writes its stacks when it is told to."""
        return self.run_dir / "logs" / f"stacks_{self.number:06d}" / f"rank_{rank:05d}.txt"

    def _read_stack(self, rank: int) -> list[str]:
        """The innermost calls of a rank's main thread."""
        try:
            text = self.stacks(rank).read_text(errors="replace")
        except OSError:
            return []
        # The main thread is the one whose stack begins in the template.
        threads = [part.splitlines() for part in text.split("\n\n")]
        main = [lines for lines in threads if any("template.py" in line for line in lines)]
        calls = [line.strip() for line in (main or threads)[-1] if line.startswith("  File")]
        return calls[:_CALLS]


def told_status(status: int) -> str:
    """How a rank ended, in words."""
    if status >= 0:
        return f"exit {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
