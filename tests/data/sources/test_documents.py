"""Interleaved documents and preferences."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.data.chat import ThinkingSettings
from megatron_vlm.data.draft import Picture, Special, Text
from megatron_vlm.data.sources.interleaved import open_interleaved
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.preference import open_preferences
from megatron_vlm.errors import DataError
from tests.data.sources.reading import (
    ASSISTANT,
    END,
    EOS,
    asked,
    assert_resumes,
    media_of,
    only,
    parts_of,
    reasons,
    said,
    write_lines,
)

pytestmark = pytest.mark.unit

OPTIONS = SourceOptions()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(name.encode() * 5)
    return tmp_path


def test_interleaved_documents(folder: Path) -> None:
    entries = [
        {"images": ["a.png", None, "b.png", None], "texts": [None, "one", None, "two"], "u": "x"},
        {"images": [None, None, None, "a.png", None], "texts": ["1", None, "2", None, ""]},
        {"images": [None], "texts": ["no picture"]},
    ]
    source = open_interleaved(write_lines(folder / "x.jsonl", entries), OPTIONS)
    listing = assert_resumes(source)
    assert source.kind == "document"
    assert [item[3] for item in listing] == [
        [
            (
                [Picture(0), Text("one", True), Picture(1), Text("two", True), EOS],
                [b"aaaaa", b"bbbbb"],
                entries[0],
            )
        ],
        [([Text("1\n\n2", True), Picture(0), EOS], [b"aaaaa"], entries[1])],
        [([Text("no picture", True), EOS], [], entries[2])],
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "entry is list"),
        ({"texts": ["a"]}, "images: is missing; expected a list"),
        ({"texts": "a", "images": []}, "texts: is str"),
        ({"texts": ["a"], "images": []}, "images, texts: 0 and 1 items"),
        ({"texts": ["a"], "images": ["a.png"]}, "images[0], texts[0]: both are given"),
        ({"texts": [3], "images": [None]}, "texts[0]: is int"),
        ({"texts": [None], "images": ["a.png"]}, "holds no text"),
        ({"texts": [" "], "images": [None]}, "holds no text"),
        ({"texts": [None, "x"], "images": ["http://a/b", None]}, "is an address"),
        ({"texts": [None, "x"], "images": ["c.png", None]}, "image 'c.png': no such file"),
        ({"texts": [None, "x"], "images": [7, None]}, "image: is int"),
    ],
)
def test_documents_that_are_none(folder: Path, entry: Any, message: str) -> None:
    (found,) = reasons(open_interleaved(write_lines(folder / "x.jsonl", [entry]), OPTIONS))
    assert found.startswith("x.jsonl line 1: ") and message in found


def test_parquet_without_its_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"x.parquet: .*pip install 'megatron-vlm\[parquet\]'"):
        open_interleaved(folder / "x.parquet", OPTIONS)


UNLEARNED = [ASSISTANT, Text("hello", False), END]


def turns(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "entry",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": turns("q"), "chosen": "good", "rejected": "bad"},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {"chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad")},
    ],
)
def test_a_preference_is_two_samples(folder: Path, entry: dict[str, Any]) -> None:
    source = open_preferences(write_lines(folder / "x.jsonl", [entry]), OPTIONS)
    assert source.kind == "preference"
    ((_, _, _, samples),) = assert_resumes(source)
    assert [sample[0] for sample in samples] == [
        [*asked("q"), *said("good"), EOS],
        [*asked("q"), *said("bad"), EOS],
    ]
    assert [sample[2] for sample in samples] == [
        {key: value for key, value in entry.items() if key != other}
        for other in ("rejected", "chosen")
    ]


def test_a_prompt_is_not_learned_and_pictures_serve_both(folder: Path) -> None:
    uri = "data:image/jpeg;base64," + base64.b64encode(b"jpeg").decode()
    entry = {
        "images": ["b.png", uri],
        "prompt": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "image"}]},
        ],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    source = open_preferences(write_lines(folder / "x.jsonl", [entry]), OPTIONS)
    chosen, rejected = next(source.entries()).drafts()
    for draft, answer in ((chosen, "good"), (rejected, "bad")):
        parts = [*asked("hi"), *UNLEARNED, *asked(Picture(0), Picture(1)), *said(answer), EOS]
        assert parts_of(draft) == parts
        assert media_of(draft) == [b"bbbbb", b"jpeg"]
        assert uri not in draft.entry.decode()


def test_a_picture_without_a_mark_opens_the_prompt(folder: Path) -> None:
    entry = {"images": ["a.png"], "prompt": "q", "chosen": "good", "rejected": "bad"}
    source = open_preferences(write_lines(folder / "x.jsonl", [entry]), OPTIONS)
    for draft in next(source.entries()).drafts():
        assert parts_of(draft)[:4] == asked(Picture(0), "\nq")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "entry is int"),
        ({"prompt": "q", "chosen": "a"}, "rejected: expected an answer"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: expected an answer"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen: expected an answer"),
        ({"prompt": "q", "chosen": "b", "rejected": "b"}, "are the same"),
        (
            {"prompt": "q", "chosen": "b", "rejected": [{"from": "gpt", "value": "b"}]},
            "chosen, rejected: say the same, so",
        ),
        ({"chosen": "a", "rejected": "b"}, "prompt: is missing"),
        ({"chosen": turns("p", "a"), "rejected": turns("q", "b")}, "prompt: is missing"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt: expected a list"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: expected a list"),
        ({"prompt": "q", "chosen": [3], "rejected": "b"}, "chosen[0]: is int"),
        (
            {"prompt": "other", "chosen": turns("q", "a"), "rejected": turns("q", "b")},
            "prompt: differs from what chosen and rejected begin with",
        ),
        ({"prompt": "q", "chosen": turns("x"), "rejected": "b"}, "no assistant turn"),
        (
            {"chosen": turns("q", "a", "r", "b"), "rejected": turns("q", "a")},
            "rejected: expected a list of at least one turn",
        ),
        ({"prompt": "q", "image": "x", "chosen": "a", "rejected": "b"}, "no such file"),
    ],
)
def test_preferences_that_are_none(folder: Path, entry: Any, message: str) -> None:
    (found,) = reasons(open_preferences(write_lines(folder / "x.jsonl", [entry]), OPTIONS))
    assert found.startswith("x.jsonl line 1: ") and message in found


@pytest.mark.parametrize(
    ("thinking", "rejected", "message"),
    [
        ("keep", "good", None),
        ("drop", "bad", None),
        ("drop", "good", "say the same once their traces are dropped"),
        ("toggle", "bad", "gives them different prompts"),
    ],
)
def test_traces_of_one_side(
    folder: Path, thinking: Any, rejected: str, message: str | None
) -> None:
    """Both sides answer one prompt, and answer it otherwise."""
    chosen = [{"role": "assistant", "content": "good", "reasoning_content": "why"}]
    entry = {"prompt": "q", "chosen": chosen, "rejected": rejected}
    options = replace(OPTIONS, thinking=ThinkingSettings(thinking))
    source = open_preferences(write_lines(folder / "x.jsonl", [entry]), options)
    if message is None:
        assert len(next(source.entries()).drafts()) == 2
    else:
        assert message in reasons(source)[0]


def test_unlearned_end(folder: Path) -> None:
    """An answer that ends with a user's turn ends with an `<|eos|>` that is not learned."""
    entry = {"chosen": turns("q", "a", "thanks"), "rejected": turns("q", "b", "no")}
    source = open_preferences(write_lines(folder / "x.jsonl", [entry]), OPTIONS)
    for draft in next(source.entries()).drafts():
        assert parts_of(draft)[-1] == Special("eos", False)


def test_entry_keeps_what_was_there(folder: Path) -> None:
    entry = {"id": 5, "images": [None, "a.png"], "texts": ["ü\ud800", None], "meta": {"k": [1.5]}}
    source = open_interleaved(write_lines(folder / "x.jsonl", [entry]), OPTIONS)
    assert json.loads(only(source).entry) == entry
