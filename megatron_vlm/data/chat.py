"""The chat format: how a conversation becomes parts, parts token ids, and which are targets.

`<|user|>TEXT<|end|><|assistant|>TEXT<|end|> ... <|eos|>`, with one `<|image|>` placeholder where
each picture goes. Only what the assistant has to say is learned, unless a turn says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from megatron_vlm.data.draft import Part, Picture, Special, Text, Tokens
from megatron_vlm.data.marks import IMAGE_MARK, VIDEO_MARK, MarkedTexts, MediaKind
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError

Role = Literal["system", "user", "assistant"]

Thinking: TypeAlias = Literal["keep", "drop", "toggle"]
"""What becomes of a thinking trace: it is written before the answer, left out, or written under a
system prompt that asks for it, with another one where there is no trace (Seed1.5-VL: separate
system prompts toggle thinking)."""

THOUGHT = "<think>\n{reasoning}\n</think>\n\n"
"""How a thinking trace stands before its answer."""

CHAT_SETTINGS: dict[str, object] = {
    "turn": "<|ROLE|>TEXT<|end|>",
    "roles": list(get_args(Role)),
    "sample_end": "<|eos|>",
    "image_mark": IMAGE_MARK,
    "video_mark": VIDEO_MARK,
    "thought": THOUGHT.format(reasoning="REASONING"),
    "loss": "assistant text, its <|end|>, and <|eos|> after an assistant turn",
}
"""The format as `dataset.json` records it."""


class Turn(NamedTuple):
    """One speaker's text, with `<image>` and `<video>` where media go, and grounding marks."""

    role: Role
    text: str
    reasoning: str | None = None
    """An assistant's thinking trace. It may hold grounding marks; media cannot stand in it."""
    learned: bool | None = None
    """Whether text and `<|end|>` are targets; null: if this is an assistant turn."""

    @property
    def is_learned(self) -> bool:
        """Whether it is a target, the role's default applied."""
        return self.role == "assistant" if self.learned is None else self.learned


@dataclass(frozen=True, slots=True)
class ThinkingSettings:
    """What becomes of thinking traces."""

    mode: Thinking = "keep"
    thinking_prompt: str = (
        "Think first: write your reasoning between <think> and </think>, then answer."
    )
    """System prompt of a conversation with a trace, under `toggle`. Our wording."""
    plain_prompt: str = "Answer directly, without writing down any reasoning first."
    """System prompt of one without, under `toggle`. Our wording."""

    def prompt(self, thinks: bool) -> str:
        """The system prompt of a conversation with a trace, or of one without."""
        return self.thinking_prompt if thinks else self.plain_prompt


def conversation_parts(
    turns: Sequence[Turn],
    media_kinds: Sequence[MediaKind] = (),
    *,
    objects: Sequence[Any] | None = None,
    video_fps: float | None = None,
    thinking: ThinkingSettings | None = None,
) -> list[Part]:
    """Parts of one conversation; see `session_parts`."""
    return session_parts(
        [turns], media_kinds, objects=objects, video_fps=video_fps, thinking=thinking
    )


def session_parts(
    sessions: Sequence[Sequence[Turn]],
    media_kinds: Sequence[MediaKind] = (),
    *,
    objects: Sequence[Any] | None = None,
    video_fps: float | None = None,
    thinking: ThinkingSettings | None = None,
) -> list[Part]:
    """Parts of one sample: conversations one after another, each closed by `<|eos|>`.

    Several in one sample are dots.llm1's multi-session concatenation. Without any mark of a medium,
    all media and a line break open the first user turn of the first of them (its first turn, if
    there is no user), just as if they had been marked there.

    Args:
        sessions: the conversations, in order.
        media_kinds: what each of the sample's media is, in the order of `Draft.media`. `<video>` is
            a mark only where there is a video.
        objects: what grounding marks refer to (`grounding`); null: they are text like any other.
        video_fps: frames a second wanted of the videos; null: the build's default.
        thinking: what becomes of thinking traces; null: they are kept.

    Raises:
        DataError: a conversation without turns, nothing that is learned, an unknown role, a trace
            that is not the assistant's, or marks that do not fit the media or objects.
    """
    thinking = thinking or ThinkingSettings()
    check_turns(sessions)
    marked = MarkedTexts(media_kinds, objects, video_fps)
    opening = marked.opening(turn.text for turns in sessions for turn in turns)
    check_learned(sessions)
    parts: list[Part] = []
    for number, turns in enumerate(sessions):
        opened = open_first(turns, opening) if number == 0 else turns
        shown = _with_switch(opened, thinking)
        for turn in shown:
            parts += _turn_parts(turn, marked)
        parts.append(Special("eos", shown[-1].is_learned))
    return parts


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Ids of a sample's parts and the flag of each: 1 where this token is a target.

    Neighbouring texts that are learned alike are encoded as one: what was a mark between them
    leaves no seam. The first token is never a target, since nothing comes before it.

    Args:
        tokenizer: gives ids and special tokens.
        parts: with every `Video` and `Mark` resolved.

    Returns:
        ids [n] with one placeholder for each `Picture`, and flags [n].

    Raises:
        DataError: a text that cannot be encoded, or token ids that are not this tokenizer's.
    """
    ids: list[int] = []
    flags: list[int] = []
    texts: list[str] = []
    for part, following in zip_longest(parts, parts[1:]):
        if isinstance(part, Text):
            texts.append(part.text)
            if isinstance(following, Text) and following.learned == part.learned:
                continue
            new, learned = tokenizer.encode("".join(texts)), part.learned
            texts.clear()
        elif isinstance(part, Picture):
            # The placeholder grows into features, which no token can predict.
            new, learned = [tokenizer.image_id], False
        elif isinstance(part, Special):
            new, learned = [tokenizer.special(part.role)], part.learned
        elif isinstance(part, Tokens):
            new, learned = _checked_ids(tokenizer, part), part.learned
        else:
            raise TypeError(f"{type(part).__name__} has to be resolved before it is encoded")
        ids += new
        flags += [int(learned)] * len(new)
    flags[:1] = [0] * len(flags[:1])
    return ids, flags


def encode_conversation(
    tokenizer: Tokenizer, turns: Sequence[Turn | tuple[Role, str]], num_pictures: int
) -> tuple[list[int], list[int]]:
    """Ids and flags of a conversation whose media are all pictures.

    Args:
        tokenizer: gives ids and special tokens.
        turns: in order.
        num_pictures: placeholders wanted.

    Returns:
        ids [n] with exactly `num_pictures` placeholders, and flags [n].

    Raises:
        DataError: no assistant turn, an unknown role, or marks and pictures differ in number.
    """
    kinds: list[MediaKind] = ["image"] * num_pictures
    return encode_parts(tokenizer, conversation_parts([Turn(*turn) for turn in turns], kinds))


def encode_prompt(
    tokenizer: Tokenizer,
    text: str,
    num_pictures: int,
    *,
    system: str | None = None,
    thinks: bool | None = None,
) -> list[int]:
    """Ids of one user turn and the opening of the answer, for generation.

    Equal to the beginning of `encode_conversation` of the same question.

    Args:
        tokenizer: gives ids and special tokens.
        text: the question.
        num_pictures: placeholders wanted.
        system: prompt of the system; null: there is no such turn.
        thinks: under the system prompt that asks for a thinking trace, or under the one that asks
            for none, as `toggle` writes them (`ThinkingSettings`); null: under neither.

    Raises:
        DataError: marks and pictures differ in number.
    """
    conversation = [] if system is None else [Turn("system", system)]
    conversation += [Turn("user", text), Turn("assistant", "")]
    if thinks is not None:
        conversation = _under_prompt(conversation, ThinkingSettings().prompt(thinks))
    ids, _ = encode_conversation(tokenizer, conversation, num_pictures)
    return ids[:-2]


def has_reasoning(turn: Turn) -> bool:
    """Whether a turn has a thinking trace; one of white space alone is none."""
    return turn.reasoning is not None and bool(turn.reasoning.strip())


def check_turns(sessions: Sequence[Sequence[Turn]]) -> None:
    """Refuse turns that cannot be.

    Raises:
        DataError: an unknown role, or a thinking trace that is not the assistant's.
    """
    for turn in (turn for turns in sessions for turn in turns):
        if turn.role not in get_args(Role):
            raise DataError(f"role {turn.role!r}: expected one of {', '.join(get_args(Role))}")
        if turn.role != "assistant" and has_reasoning(turn):
            raise DataError(f"reasoning of a {turn.role} turn: only the assistant may have one")


def check_learned(sessions: Sequence[Sequence[Turn]]) -> None:
    """Refuse conversations that teach nothing.

    Raises:
        DataError: nothing is learned, or one has no turns.
    """
    if not any(turn.is_learned for turns in sessions for turn in turns):
        lacks = (
            "learned" if any(t.role == "assistant" for ts in sessions for t in ts) else "assistant"
        )
        raise DataError(f"conversation has no {lacks} turn, so there is nothing to learn")
    for number, turns in enumerate(sessions):
        if not turns:
            raise DataError(f"sessions[{number}]: has no turns; leave it out")


def open_first(turns: Sequence[Turn], opening: str) -> Sequence[Turn]:
    """The turns with `MarkedTexts.opening` put before the first question."""
    if not opening:
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    opened = turns[first]._replace(text=opening + turns[first].text)
    return [*turns[:first], opened, *turns[first + 1 :]]


def _with_switch(turns: Sequence[Turn], thinking: ThinkingSettings) -> Sequence[Turn]:
    """The turns as they are shown: without traces, or under the prompt that toggles them."""
    if thinking.mode == "drop":
        return [turn._replace(reasoning=None) for turn in turns]
    if thinking.mode == "keep":
        return turns
    return _under_prompt(turns, thinking.prompt(any(has_reasoning(turn) for turn in turns)))


def _under_prompt(turns: Sequence[Turn], prompt: str) -> list[Turn]:
    """The turns with `prompt` opening their system turn, or as their system turn."""
    if turns[0].role == "system":
        return [turns[0]._replace(text=f"{prompt}\n\n{turns[0].text}"), *turns[1:]]
    return [Turn("system", prompt), *turns]


def _turn_parts(turn: Turn, marked: MarkedTexts) -> list[Part]:
    learned = turn.is_learned
    parts: list[Part] = [Special(turn.role, False)]
    if turn.reasoning is not None and has_reasoning(turn):
        before, after = THOUGHT.split("{reasoning}")
        trace = marked.split_grounding(turn.reasoning, learned)
        parts += [Text(before, learned), *trace, Text(after, learned)]
    parts += marked.split(turn.text, learned)
    parts.append(Special("end", learned))
    return parts


def _checked_ids(tokenizer: Tokenizer, part: Tokens) -> list[int]:
    ids = part.ids
    outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if outside.size:
        raise DataError(
            f"token id {outside[0]}: expected 0 to {tokenizer.vocab_size - 1}; the tokens are of "
            "another tokenizer"
        )
    if np.any(ids == tokenizer.image_id):
        raise DataError(
            f"token id {tokenizer.image_id}: a picture's placeholder without a picture; the tokens "
            "are of another tokenizer"
        )
    return [int(i) for i in ids]
