"""How a supervised run is doing, from what lies in its folder alone."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.resilience import attempts, events
from megatron_vlm.resilience.supervisor import STATUS

_SILENT_SECONDS = 15.0
_RATE_STEPS = 20


@dataclass
class Summary:
    """What `mvlm status` shows."""

    state: str
    """Of the supervisor; `silent` when nothing was heard of it, `unsupervised` without one."""
    job: str | None
    host: str
    attempt: int
    iteration: int
    """Of the newest step that counts."""
    seconds_per_step: float | None
    """Median of the newest."""
    checkpoint: int | None
    """Iteration of the newest checkpoint."""
    checkpoint_age: float | None
    """Seconds since it was written."""
    nodes: dict[str, dict[str, Any]]
    avoided: list[str]
    causes: list[dict[str, Any]] = field(default_factory=list)
    """Events of failures, requeues and the like, oldest first."""
    elapsed: float = 0.0
    """Seconds since the run was first started."""
    training: float = 0.0
    """Of them, spent in steps that count."""

    @property
    def effective(self) -> float | None:
        """Share of the time that went into steps that count."""
        return self.training / self.elapsed if self.elapsed > 0 else None


_TOLD = ("rank died", "hang", "node lost", "failed", "requeue", "asked to stop", "node avoided")


def summarize(run_dir: Path, now: float | None = None) -> Summary:
    """Read a run folder.

    Args:
        run_dir: the run's folder.
        now: seconds since 1970; null: the present.
    """
    now = time.time() if now is None else now
    told = _read_json(run_dir / STATUS)
    history = list(events.read(run_dir))
    over = {"finished", "stopped", "refused", "gave up", "no nodes"}
    state = str(told.get("state", "unsupervised"))
    if state not in over | {"unsupervised"} and now - float(told["time"]) > _SILENT_SECONDS:
        state = "silent"
    if (run_dir / attempts.FINISHED).exists():
        state = "finished"
    iteration, training, steps = _steps(run_dir / "metrics.jsonl")
    checkpoint, age = _checkpoint(run_dir / "checkpoints", now)
    started = next((e["time"] for e in history if e["event"] == "job started"), None)
    end = now
    if state in over and history:
        end = history[-1]["time"]
    return Summary(
        state=state,
        job=told.get("job"),
        host=str(told.get("host", "")),
        attempt=int(told.get("attempt", 0)),
        iteration=iteration,
        seconds_per_step=sorted(steps)[len(steps) // 2] if steps else None,
        checkpoint=checkpoint,
        checkpoint_age=age,
        nodes=dict(told.get("nodes", {})) if state not in over else {},
        avoided=list(told.get("avoided", [])),
        causes=[e for e in history if e["event"] in _TOLD],
        elapsed=end - started if started is not None else 0.0,
        training=training,
    )


def _steps(path: Path) -> tuple[int, float, deque[float]]:
    """The newest iteration, the seconds of all steps, and of the newest ones."""
    iteration, total = 0, 0.0
    newest: deque[float] = deque(maxlen=_RATE_STEPS)
    try:
        with open(path, errors="replace") as stream:
            for line in stream:
                try:
                    entry = json.loads(line)
                    iteration, seconds = int(entry["iteration"]), float(entry["step_time_s"])
                except (ValueError, KeyError):
                    continue  # Cut short by a crash.
                total += seconds
                newest.append(seconds)
    except FileNotFoundError:
        pass
    return iteration, total, newest


def _checkpoint(root: Path, now: float) -> tuple[int | None, float | None]:
    path = root / "latest_checkpointed_iteration.txt"
    try:
        return int(path.read_text()), now - path.stat().st_mtime
    except (OSError, ValueError):
        return None, None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
