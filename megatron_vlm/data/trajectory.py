"""Trajectories: an instruction, then screenshots with the actions taken on them (UI-TARS).

`{"instruction": TEXT, "steps": [{"image": PATH, "thought": TEXT, "action": TEXT}, ...]}` becomes
`<|user|>INSTRUCTION, line break, picture<|end|><|assistant|>Thought: ... Action: ...<|end|>`, then
for each further step `<|user|>picture<|end|>` and the assistant's turn. Actions alone are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.data.draft import Part, Picture, Special
from megatron_vlm.data.grounding import split_marks
from megatron_vlm.errors import DataError

THOUGHT_LINE = "Thought: {thought}\n"
ACTION_LINE = "Action: {action}"
"""How an answer is written; a step without a thought has the action alone. After UI-TARS."""


@dataclass(frozen=True, slots=True)
class Step:
    """One screenshot, and what was done."""

    image: str
    """Path of the screenshot."""
    action: str
    """It may hold grounding marks: `click(<point:0>)`."""
    thought: str | None = None


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What was to be done, and the steps in order."""

    instruction: str
    steps: tuple[Step, ...]


def parse_trajectory(entry: Any) -> Trajectory:
    """Check one entry of a source.

    Raises:
        DataError: the reason why it cannot be a trajectory; names the field.
    """
    if not isinstance(entry, dict):
        raise DataError(f"entry is {type(entry).__name__}; expected an object")
    steps = entry.get("steps")
    if not isinstance(steps, list) or not steps:
        raise DataError("steps: expected a list of at least one step")
    return Trajectory(
        _text(entry, "instruction", "instruction"),
        tuple(_step(step, f"steps[{number}]") for number, step in enumerate(steps)),
    )


def trajectory_parts(
    trajectory: Trajectory, *, objects: Sequence[Any] | None = None, learn_thoughts: bool = False
) -> list[Part]:
    """Parts of a trajectory. Its media are the steps' pictures, in order.

    Args:
        trajectory: checked.
        objects: what grounding marks in any of its texts refer to; null: they are text like any
            other. `image` of an object is the number of its step.
        learn_thoughts: thoughts are targets as actions are.

    Raises:
        DataError: a grounding mark that cannot be resolved.
    """
    pictures = range(len(trajectory.steps))
    parts: list[Part] = []
    for number, step in enumerate(trajectory.steps):
        parts.append(Special("user", False))
        if number == 0:
            parts += split_marks(trajectory.instruction + "\n", False, objects, pictures)
        parts += [Picture(number), Special("end", False), Special("assistant", False)]
        if step.thought is not None:
            thought = THOUGHT_LINE.format(thought=step.thought)
            parts += split_marks(thought, learn_thoughts, objects, pictures)
        action = ACTION_LINE.format(action=step.action)
        parts += [*split_marks(action, True, objects, pictures), Special("end", True)]
    parts.append(Special("eos", True))
    return parts


def _step(step: Any, name: str) -> Step:
    if not isinstance(step, dict):
        raise DataError(f"{name}: is {type(step).__name__}; expected an object")
    image = _text(step, "image", f"{name}.image")
    thought = None
    if step.get("thought") is not None:
        thought = _text(step, "thought", f"{name}.thought").strip() or None
    return Step(image, _text(step, "action", f"{name}.action"), thought)


def _text(holder: dict[str, Any], field: str, name: str) -> str:
    """A text that has to be there and say something, unless it is a thought."""
    value = holder.get(field)
    if not isinstance(value, str):
        raise DataError(f"{name}: is {type(value).__name__}; expected a string")
    if field != "thought" and not value.strip():
        raise DataError(f"{name}: is empty; expected a text")
    return value
