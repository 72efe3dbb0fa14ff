"""Trajectories: what a source makes of their entries. Their parts have tests of their own."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.draft import Mark, Picture, Text
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.trajectories import open_trajectories
from tests.data.sources.reading import (
    ASSISTANT,
    END,
    EOS,
    LEARNED_END,
    USER,
    assert_resumes,
    only,
    parts_of,
    reasons,
    write_lines,
)

pytestmark = pytest.mark.unit

OPTIONS = SourceOptions()
URI = "data:image/png;base64," + base64.b64encode(b"second").decode()
ENTRY: dict[str, Any] = {
    "instruction": "do it",
    "steps": [
        {"image": "1.png", "thought": "hm", "action": "click()"},
        {"image": URI, "action": "done()"},
    ],
    "id": 3,
}


@pytest.mark.parametrize("learn_thoughts", [False, True])
def test_a_trajectory(tmp_path: Path, learn_thoughts: bool) -> None:
    (tmp_path / "1.png").write_bytes(b"first")
    path = write_lines(tmp_path / "x.jsonl", [ENTRY])
    source = open_trajectories(path, SourceOptions(learn_thoughts=learn_thoughts))
    assert source.kind == "trajectory"
    ((_, _, _, samples),) = assert_resumes(source)
    ((parts, media, kept),) = samples
    assert parts == [
        *(USER, Text("do it\n", False), Picture(0), END),
        *(ASSISTANT, Text("Thought: hm\n", learn_thoughts), Text("Action: click()", True)),
        *(LEARNED_END, USER, Picture(1), END),
        *(ASSISTANT, Text("Action: done()", True), LEARNED_END, EOS),
    ]
    assert media == [b"first", b"second"]
    assert kept["steps"][1] == {
        "image": "data:image/png;base64,<8 characters>",
        "action": "done()",
    }
    assert {**kept, "steps": None} == {**ENTRY, "steps": None}


def test_marks(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"first")
    entry = {
        "instruction": "do it",
        "steps": [{"image": "1.png", "action": "click(<point:0>)"}],
        "objects": [{"point": [3, 4]}],
    }
    draft = only(open_trajectories(write_lines(tmp_path / "x.jsonl", [entry]), OPTIONS))
    (mark,) = (part for part in parts_of(draft) if isinstance(part, Mark))
    assert (mark.form, mark.medium, mark.learned) == ("point", 0, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": []}, "steps: expected a list of at least one step"),
        ({"instruction": None}, "instruction: is NoneType"),
        ({"steps": [{"image": "9.png", "action": "a"}]}, "image '9.png': no such file"),
        ({"steps": [{"image": "../9.png", "action": "a"}]}, "image '../9.png': lies outside"),
        ({"steps": [{"image": "http://a/b", "action": "a"}]}, "is an address"),
        ({"objects": {}}, "objects: is dict; expected a list"),
    ],
)
def test_entries_that_are_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{**ENTRY, **changes}])
    (found,) = reasons(open_trajectories(path, OPTIONS))
    assert found.startswith("x.jsonl line 1: ") and message in found
