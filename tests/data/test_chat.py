"""Conversations as parts: thinking, marks, sessions; and the ids and flags of any parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_vlm.data.chat import (
    ThinkingSettings,
    Turn,
    conversation_parts,
    encode_conversation,
    encode_parts,
    session_parts,
)
from megatron_vlm.data.draft import Mark, Picture, Special, Text, Tokens, Video
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_tokenizer
from megatron_vlm.errors import DataError
from tests.data.test_tokenizer import foreign

pytestmark = pytest.mark.unit

PAD, EOS, IMAGE, SYSTEM, USER, ASSISTANT, END = range(256, 263)


def spelled(parts: list[Any]) -> str:
    """The parts in the format's own spelling, what is learned between braces."""
    text = ""
    for part in parts:
        if isinstance(part, Picture):
            text += f"[picture {part.medium}]"
        elif isinstance(part, Video):
            text += f"[video {part.medium} {part.fps}]"
        elif isinstance(part, Mark):
            text += f"{{[{part.form}]}}" if part.learned else f"[{part.form}]"
        else:
            shown = part.text if isinstance(part, Text) else SPECIAL_TOKENS[part.role]
            text += f"{{{shown}}}" if part.learned else shown
    return text.replace("}{", "")


def plain_encoding(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], pictures: int
) -> tuple[list[int], list[int]]:
    """The chat format, written out once more from its description."""
    if not any("<image>" in text for _, text in turns) and pictures:
        first = [role for role, _ in turns].index("user")
        turns = [
            (role, "<image>" * pictures + "\n" + text if i == first else text)
            for i, (role, text) in enumerate(turns)
        ]
    pairs: list[tuple[int, int]] = []
    for role, text in turns:
        learned = int(role == "assistant")
        pairs.append((tokenizer.special(role), 0))
        while "<image>" in text:
            before, text = text.split("<image>", 1)
            pairs += [(i, learned) for i in tokenizer.encode(before)]
            pairs.append((tokenizer.image_id, 0))
        pairs += [(i, learned) for i in tokenizer.encode(text)]
        pairs.append((tokenizer.special("end"), learned))
    pairs.append((tokenizer.eos_id, int(turns[-1][0] == "assistant")))
    return [i for i, _ in pairs], [flag for _, flag in pairs]


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), Tokenizer(foreign())], ids=["byte", "bpe"])
def test_conversations_as_ever(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(3)
    words = ["the cat", " sat on ", "<image>", "<video>", "<box:0>", "<|end|>", "\n", "", "語"]
    for _ in range(200):
        roles = ["system"] * int(rng.integers(2)) + ["user", "assistant"] * int(rng.integers(1, 4))
        turns = [(role, "".join(rng.choice(words, rng.integers(6)))) for role in roles]
        marks = sum(text.count("<image>") for _, text in turns)
        pictures = marks or int(rng.integers(3))
        expected = plain_encoding(tokenizer, turns, pictures)
        assert encode_conversation(tokenizer, turns, pictures) == expected  # type: ignore[arg-type]


def test_parts_of_a_conversation() -> None:
    turns = [
        Turn("system", "s"),
        Turn("user", "<video> and <image>: <point:0>?"),
        Turn("assistant", "at <box:0>", reasoning="hm, <point:0> <image>"),
        Turn("user", "sure?", learned=True),
        Turn("assistant", "no", learned=False),
        Turn("assistant", "yes<image>"),
    ]
    objects = [{"point": [1, 2], "box": [0, 0, 1, 1]}]
    parts = conversation_parts(turns, ["image", "video", "image"], objects=objects, video_fps=2.0)
    assert spelled(parts) == (
        "<|system|>s<|end|>"
        "<|user|>[video 1 2.0] and [picture 0]: [point]?<|end|>"
        "<|assistant|>{<think>\nhm, [point] <image>\n</think>\n\nat [box]<|end|>}"
        "<|user|>{sure?<|end|>}"
        "<|assistant|>no<|end|>"
        "<|assistant|>{yes}[picture 2]{<|end|><|eos|>}"
    )


def test_media_without_marks_open_the_first_question() -> None:
    turns = [Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")]
    parts = conversation_parts(turns, ["video", "image"])
    assert spelled(parts) == (
        "<|system|>s<|end|><|user|>[video 0 None][picture 1]\nq<|end|>"
        "<|assistant|>{a<|end|><|eos|>}"
    )
    # Where there is no video its mark is text.
    parts = conversation_parts([Turn("user", "<video>"), Turn("assistant", "a")], ["image"])
    assert spelled(parts).startswith("<|user|>[picture 0]\n<video><|end|>")


def test_media_without_marks_open_the_first_session_alone() -> None:
    session = [Turn("user", "q"), Turn("assistant", "a")]
    assert spelled(session_parts([session, session], ["image"])) == (
        "<|user|>[picture 0]\nq<|end|><|assistant|>{a<|end|><|eos|>}"
        "<|user|>q<|end|><|assistant|>{a<|end|><|eos|>}"
    )


def test_sessions_one_after_another() -> None:
    sessions = [
        [Turn("user", "q"), Turn("assistant", "a")],
        [Turn("assistant", "b"), Turn("user", "<image>")],
    ]
    assert spelled(session_parts(sessions, ["image"])) == (
        "<|user|>q<|end|><|assistant|>{a<|end|><|eos|>}"
        "<|assistant|>{b<|end|>}<|user|>[picture 0]<|end|><|eos|>"
    )
    ids, flags = encode_parts(byte_tokenizer(), session_parts(sessions, ["image"]))
    assert ids == [
        *[USER, ord("q"), END, ASSISTANT, ord("a"), END, EOS],
        *[ASSISTANT, ord("b"), END, USER, IMAGE, END, EOS],
    ]
    assert flags == [0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "reasoning", "system", "expected"),
    [
        ("keep", "r", None, "<|user|>q<|end|><|assistant|>{<think>\nr\n</think>\n\na<|end|>"),
        ("keep", " \n", None, "<|user|>q<|end|><|assistant|>{a<|end|>"),
        ("drop", "r", None, "<|user|>q<|end|><|assistant|>{a<|end|>"),
        (
            *("toggle", "r", None),
            "<|system|>T<|end|><|user|>q<|end|><|assistant|>{<think>\nr\n</think>\n\na<|end|>",
        ),
        ("toggle", None, None, "<|system|>P<|end|><|user|>q<|end|><|assistant|>{a<|end|>"),
        (
            *("toggle", None, "be brief"),
            "<|system|>P\n\nbe brief<|end|><|user|>q<|end|><|assistant|>{a<|end|>",
        ),
    ],
)
def test_thinking(mode: Any, reasoning: str | None, system: str | None, expected: str) -> None:
    settings = ThinkingSettings(mode, thinking_prompt="T", plain_prompt="P")
    turns = [Turn("user", "q"), Turn("assistant", "a", reasoning)]
    if system is not None:
        turns = [Turn("system", system), *turns]
    assert spelled(conversation_parts(turns, thinking=settings)) == expected + "<|eos|>}"


def test_toggle_tells_sessions_apart() -> None:
    sessions = [
        [Turn("user", "q"), Turn("assistant", "a", "r")],
        [Turn("user", "q"), Turn("assistant", "a")],
    ]
    text = spelled(session_parts(sessions, thinking=ThinkingSettings("toggle")))
    first, second, rest = text.split("<|eos|>}")
    assert rest == ""
    assert first.startswith("<|system|>" + ThinkingSettings().thinking_prompt + "<|end|>")
    assert second.startswith("<|system|>" + ThinkingSettings().plain_prompt + "<|end|>")


def test_neighbouring_texts_are_encoded_as_one() -> None:
    tokenizer = Tokenizer(foreign())
    whole = tokenizer.encode("the cat sat")
    assert len(whole) < len(tokenizer.encode("the c") + tokenizer.encode("at sat"))
    parts = [Special("user", False), Text("the c", True), Text("at", True), Text(" sat", True)]
    assert encode_parts(tokenizer, parts) == (
        [tokenizer.special("user"), *whole],
        [0] + [1] * len(whole),
    )
    # What is learned is encoded apart from what is not.
    apart = [Special("user", False), Text("the c", False), Text("at sat", True)]
    first, second = tokenizer.encode("the c"), tokenizer.encode("at sat")
    assert encode_parts(tokenizer, apart) == (
        [tokenizer.special("user"), *first, *second],
        [0] * (1 + len(first)) + [1] * len(second),
    )


def test_nothing_comes_before_the_first_token() -> None:
    tokenizer = byte_tokenizer()
    assert encode_parts(tokenizer, [Text("ab", True)]) == ([97, 98], [0, 1])
    tokens = Tokens(np.array([7, 8, EOS], np.int32), True)
    assert encode_parts(tokenizer, [tokens]) == ([7, 8, EOS], [0, 1, 1])
    assert encode_parts(tokenizer, [Picture(0), tokens]) == ([IMAGE, 7, 8, EOS], [0, 1, 1, 1])
    assert encode_parts(tokenizer, []) == ([], [])
    assert encode_parts(tokenizer, [Text("", True)]) == ([], [])


@pytest.mark.parametrize(
    ("token", "reason"), [(-1, "id -1"), (263, "0 to 262"), (IMAGE, "placehol")]
)
def test_tokens_of_another_tokenizer(token: int, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        encode_parts(byte_tokenizer(), [Tokens(np.array([5, token], np.int32), True)])


def test_parts_that_have_to_be_resolved_first() -> None:
    for part in (Video(0), Mark("box", {}, 0, True)):
        with pytest.raises(TypeError, match=type(part).__name__):
            encode_parts(byte_tokenizer(), [part])


@pytest.mark.parametrize(
    ("sessions", "kinds", "reason"),
    [
        ([[Turn("user", "q", "r"), Turn("assistant", "a")]], [], "reasoning of a user turn"),
        ([[Turn("user", "q"), Turn("assistant", "a", learned=False)]], [], "no learned turn"),
        ([[Turn("user", "q"), Turn("assistant", "a")], []], [], r"sessions\[1\]: has no turns"),
        ([[], [Turn("user", "q"), Turn("assistant", "a")]], ["image"], r"sessions\[0\]: has no"),
        ([], [], "no assistant turn"),
        ([[Turn("user", "<image>"), Turn("assistant", "")]], ["image", "video"], "0 <video> marks"),
        (
            [[Turn("user", "<video>" * 2), Turn("assistant", "")]],
            ["video"],
            "2 <video> marks but 1",
        ),
    ],
)
def test_samples_that_cannot_be(sessions: list[list[Turn]], kinds: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        session_parts(sessions, kinds)
