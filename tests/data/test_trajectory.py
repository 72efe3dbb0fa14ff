"""Trajectories: what their parts are, and which of their tokens are learned."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vlm.data.chat import encode_parts
from megatron_vlm.data.draft import Picture
from megatron_vlm.data.grounding import resolve_marks
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.data.trajectory import Step, Trajectory, parse_trajectory, trajectory_parts
from megatron_vlm.errors import DataError

pytestmark = pytest.mark.unit

ENTRY: dict[str, Any] = {
    "instruction": "Open <image> {x}.",
    "steps": [
        {"image": "a.png", "thought": " The menu is <point:0>.\n", "action": "click(<point:0>)"},
        {"image": "b.png", "thought": " ", "action": "type('{q}')"},
        {"image": "c.png", "action": "done()"},
    ],
    "objects": [{"point": [10, 50]}],
}
SIZES = [(100, 20)] * 3


def spelled(learn_thoughts: bool, objects: Any = ENTRY["objects"]) -> str:
    """The sample's tokens with learned runs in brackets."""
    parts = trajectory_parts(
        parse_trajectory(ENTRY), objects=objects, learn_thoughts=learn_thoughts
    )
    tokenizer = byte_tokenizer()
    ids, flags = encode_parts(tokenizer, resolve_marks(parts, SIZES, None, "relative"))
    text, before = "", 0
    for token, flag in zip(ids, flags, strict=True):
        text += "[" * (flag > before) + "]" * (flag < before)
        text += tokenizer.decode([token], skip_special_tokens=False)
        before = flag
    return text + "]" * before


def test_only_actions_are_learned() -> None:
    assert spelled(False) == (
        "<|user|>Open <image> {x}.\n<|image|><|end|>"
        "<|assistant|>Thought: The menu is <point>500 500</point>.\n"
        "[Action: click(<point>500 500</point>)<|end|>]"
        "<|user|><|image|><|end|><|assistant|>[Action: type('{q}')<|end|>]"
        "<|user|><|image|><|end|><|assistant|>[Action: done()<|end|><|eos|>]"
    )


def test_thoughts_are_learned_when_asked() -> None:
    assert spelled(True).startswith(
        "<|user|>Open <image> {x}.\n<|image|><|end|>"
        "<|assistant|>[Thought: The menu is <point>500 500</point>.\n"
        "Action: click(<point>500 500</point>)<|end|>]<|user|>"
    )
    assert "[Action: click(<point:0>)<|end|>]" in spelled(False, objects=None)


def test_marks_refer_to_the_step_of_their_picture() -> None:
    trajectory = Trajectory("go", (Step("a.png", "wait()"), Step("b.png", "click(<point:0>)")))
    parts = trajectory_parts(trajectory, objects=[{"point": [30, 10], "image": 1}])
    assert [part.medium for part in parts if isinstance(part, Picture)] == [0, 1]
    resolved = resolve_marks(parts, [(9, 9), (20, 40)], None, "relative")
    ids, _ = encode_parts(byte_tokenizer(), resolved)
    assert "click(<point>749 500</point>)" in byte_tokenizer().decode(ids)
    with pytest.raises(DataError, match="expected the place of one of the entry's 2 pictures"):
        trajectory_parts(trajectory, objects=[{"point": [30, 10], "image": 2}])


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ([], "entry is list"),
        ({"instruction": "x"}, "steps: expected a list"),
        ({"instruction": "x", "steps": []}, "steps: expected a list"),
        ({"steps": ENTRY["steps"]}, "instruction: is NoneType"),
        ({"instruction": " ", "steps": ENTRY["steps"]}, "instruction: is empty"),
        ({"instruction": "x", "steps": ["a"]}, r"steps\[0\]: is str"),
        ({"instruction": "x", "steps": [{"action": "a"}]}, r"steps\[0\].image: is NoneType"),
        ({"instruction": "x", "steps": [{"image": "a"}]}, r"steps\[0\].action: is NoneType"),
        ({"instruction": "x", "steps": [{"image": "", "action": "a"}]}, "image: is empty"),
        ({"instruction": "x", "steps": [{"image": "a", "action": ""}]}, "action: is empty"),
        (
            {"instruction": "x", "steps": [{"image": "a", "action": "a", "thought": 1}]},
            "thought: is int",
        ),
    ],
)
def test_entries_that_are_no_trajectory(entry: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        parse_trajectory(entry)
