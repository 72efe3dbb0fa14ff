"""What metrics.jsonl tells about a run: losses and learning rates by iteration."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_KEPT = ("iteration", "consumed_tokens", "learning_rate", "global_batch_size")
_NO_OBJECTIVE = "load_balancing_loss"


@dataclass(frozen=True)
class History:
    """The steps of a run, as far as they were written down."""

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by iteration, ascending; of an iteration written twice, the last."""
    unreadable: int = 0
    """Lines that are no metrics of a step."""
    found: bool = False
    """Whether there was a file at all."""

    def losses(self, iteration: int) -> dict[str, float]:
        """Training losses of one step by name; empty where they are not known."""
        step = self.steps.get(iteration, {})
        return {name: value for name, value in step.items() if _is_training_loss(name)}

    def validation(self, iteration: int) -> dict[str, tuple[float, int]]:
        """The newest value of each validation metric at or before a step, and of which step."""
        newest: dict[str, tuple[float, int]] = {}
        for number, step in self.steps.items():
            if number > iteration:
                break
            for name, value in step.items():
                if name.startswith("validation"):
                    newest[name] = (value, number)
        return newest

    def learning_rate(self, iteration: int) -> float | None:
        """Of one step."""
        return self.steps.get(iteration, {}).get("learning_rate")

    def curve(self, iteration: int | None = None) -> dict[str, list[tuple[float, float]]]:
        """(tokens, loss) of the objective's losses and of validation, by name, finite ones only."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for number, step in self.steps.items():
            if "consumed_tokens" not in step or (iteration is not None and number > iteration):
                continue
            for name, value in step.items():
                trained = _is_training_loss(name) and name != _NO_OBJECTIVE
                if (trained or name.startswith("validation_loss")) and math.isfinite(value):
                    lines.setdefault(name, []).append((step["consumed_tokens"], value))
        return lines


def read_history(run_dir: Path) -> History:
    """Read `metrics.jsonl`; an empty history where there is none.

    Lines that cannot be read, as a full disk or a killed run leaves them, are counted.

    Raises:
        OSError: it is there, and cannot be read.
    """
    try:
        stream = open(run_dir / "metrics.jsonl", encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return History()
    found: dict[int, dict[str, float]] = {}
    unreadable = 0
    with stream:
        for line in stream:
            step = _step(line)
            if step is None:
                unreadable += bool(line.strip())
            else:
                found[int(step["iteration"])] = step
    return History(dict(sorted(found.items())), unreadable, True)


def _step(line: str) -> dict[str, float] | None:
    try:
        values: Any = json.loads(line)
        if not isinstance(values, dict) or type(values.get("iteration")) is not int:
            return None
    except (ValueError, RecursionError):
        return None
    # A run may have a million steps: only what is used is kept.
    return {
        name: value
        for name, value in values.items()
        if (name in _KEPT or _is_training_loss(name) or name.startswith("validation"))
        and type(value) in (int, float)
    }


def _is_training_loss(name: str) -> bool:
    return name.endswith("loss") and not name.startswith("validation")
