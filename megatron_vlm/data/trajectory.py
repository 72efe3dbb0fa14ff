"""Trajectories: an instruction, then screenshots with the actions taken on them (UI-TARS).

`{"instruction": TEXT, "steps": [{"image": PATH, "thought": TEXT, "action": TEXT}, ...]}` becomes
`<|user|>INSTRUCTION, line break, picture<|end|><|assistant|>Thought: ... Action: ...<|end|>`, then
for each further step `<|user|>picture<|end|>` and the assistant's turn. Actions alone are learned.
A chat template writes the same turns in its own form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vlm.data.chat import Thinking, Turn
from megatron_vlm.data.chat_template import ChatTemplate
from megatron_vlm.data.draft import Part, Picture, Special
from megatron_vlm.data.grounding import split_marks
from megatron_vlm.data.marks import IMAGE_MARK
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
    trajectory: Trajectory,
    *,
    objects: Sequence[Any] | None = None,
    learn_thoughts: bool = False,
    template: ChatTemplate | None = None,
    thinking: Thinking = "keep",
) -> list[Part]:
    """Parts of a trajectory. Its media are the steps' pictures, in order.

    Args:
        trajectory: checked.
        objects: what grounding marks in any of its texts refer to; null: they are text like any
            other. `image` of an object is the number of its step.
        learn_thoughts: thoughts are targets as actions are.
        template: what writes the turns; null: the built-in format.
        thinking: what the template is told, which has no traces to write: thoughts are text.

    Raises:
        DataError: a grounding mark that cannot be resolved, or a template that cannot write them.
    """
    pictures = range(len(trajectory.steps))

    def split(turn: int, _: bool, text: str) -> list[Part]:
        number, answers = divmod(turn, 2)
        if not answers:
            # The turn's own mark is its last word; what the instruction spells is text.
            said = text.removesuffix(IMAGE_MARK)
            return [*split_marks(said, False, objects, pictures), Picture(number)]
        thought = _thought_line(trajectory.steps[number])
        action = text.removeprefix(thought)
        return [
            *split_marks(thought, learn_thoughts, objects, pictures),
            *split_marks(action, True, objects, pictures),
        ]

    turns = _turns(trajectory)
    if template is not None:
        return template.write(turns, split, thinking)
    parts: list[Part] = []
    for number, turn in enumerate(turns):
        parts += [Special(turn.role, False), *split(number, False, turn.text)]
        parts.append(Special("end", turn.is_learned))
    parts.append(Special("eos", True))
    return parts


def _turns(trajectory: Trajectory) -> list[Turn]:
    """Question and answer of each step; each question ends with its picture's mark."""
    turns: list[Turn] = []
    for number, step in enumerate(trajectory.steps):
        asked = "" if number else trajectory.instruction + "\n"
        turns.append(Turn("user", asked + IMAGE_MARK))
        answer = _thought_line(step) + ACTION_LINE.format(action=step.action)
        turns.append(Turn("assistant", answer))
    return turns


def _thought_line(step: Step) -> str:
    return "" if step.thought is None else THOUGHT_LINE.format(thought=step.thought)


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
