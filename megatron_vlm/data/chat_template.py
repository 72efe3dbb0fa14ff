"""Chat templates of other models: a conversation in the form that such a model was trained on.

What the template itself writes about the contents (`template_gaps`) may spell special tokens; the
contents themselves never do. The template is given texts alone: a picture or a video keeps its
place in its text, and is put there after the template has been rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from megatron_vlm.data.chat import (
    Thinking,
    Turn,
    check_learned,
    check_turns,
    encode_parts,
    has_reasoning,
    open_first,
)
from megatron_vlm.data.draft import Part, Text, Tokens
from megatron_vlm.data.marks import MarkedTexts, MediaKind
from megatron_vlm.data.template_gaps import TemplateGaps, Value
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError

TEMPLATE_SETTINGS: dict[str, object] = {
    "loss": "assistant text, what the assistant itself writes before it, and the special token "
    "that ends it",
}
"""What `dataset.json` records of dialogues that a template writes, beside the template."""

SplitText: TypeAlias = Callable[[int, bool, str], Sequence[Part]]
"""Parts of a content: the turn's number, whether it is the trace, and the text, of which the
template may have stripped white space."""

_PROBE = (Turn("user", "question"), Turn("assistant", "answer"))


def end_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> frozenset[int]:
    """Ids of the special tokens that end an answer: those of a template, or the built-in ones.

    Raises:
        DataError: the template ends answers with none.
    """
    ends = template.end_ids if template is not None else {tokenizer.special("end")}
    return frozenset({tokenizer.eos_id, *ends})


class ChatTemplate:
    """A template together with the tokenizer that it is for."""

    def __init__(self, text: TemplateText, tokenizer: Tokenizer) -> None:
        """Compile a template.

        Args:
            text: the template.
            tokenizer: its spellings of special tokens become these tokens.

        Raises:
            DataError: no valid template, or one that reads files.
        """
        self.text = text
        self._gaps = TemplateGaps(text)
        self._tokenizer = tokenizer
        self._openings: dict[bool | None, str] = {}

    def check(self, thinking: Thinking = "keep") -> None:
        """Refuse a template before it has written anything.

        Args:
            thinking: what it will be asked to do with traces.

        Raises:
            DataError: it cannot write a question and its answer with this tokenizer, cannot ask
                for an answer, or cannot toggle thinking.
        """
        for name, spelled in self.text.special_tokens.items():
            pieces = self._tokenizer.split_template(spelled)
            if len(pieces) != 1 or isinstance(pieces[0], str):
                raise DataError(
                    f"{self.text.name}: its {name} {spelled!r} is no special token of the "
                    "tokenizer; give the model's own tokenizer.json with --tokenizer"
                )
        self.write(_PROBE, lambda turn, _, text: [Text(text, _PROBE[turn].is_learned)])
        self.prompt("question")
        if thinking == "toggle":
            self.check_switch("--thinking toggle")

    def check_switch(self, asked: str) -> None:
        """Refuse a template that asks for an answer alike whether it is told to think or not.

        Raises:
            DataError: it does; `asked` names what needs the switch.
        """
        on, off = (self._gaps.asked(_PROBE[:1], thinks) for thinks in (True, False))
        if on == off:
            raise DataError(
                f"{asked}: {self.text.name} asks for an answer alike, whatever enable_thinking and "
                "thinking are; leave it out, or use a template that knows one of them"
            )

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids of the special tokens that end an answer, in a conversation and at its end.

        Raises:
            DataError: there is none.
        """
        _, gaps = self._gaps.find((*_PROBE, *_PROBE), None)
        return frozenset(self._ending(gap)[0] for gap in (gaps[2], gaps[4]))

    def session_parts(
        self,
        sessions: Sequence[Sequence[Turn]],
        media_kinds: Sequence[MediaKind] = (),
        *,
        objects: Sequence[Any] | None = None,
        video_fps: float | None = None,
        thinking: Thinking = "keep",
    ) -> list[Part]:
        """Parts of one sample: conversations one after another, each as the template writes it.

        Learned are the contents of learned turns, what the assistant itself writes before them
        (what the template does not write when it asks for an answer), and the special token that
        ends such a turn. A template may leave out traces of earlier turns, as many do, and strip
        white space from contents.

        Args:
            sessions: the conversations, in order. Several need a template that opens each with a
                special token that it writes nowhere else.
            media_kinds: what each of the sample's media is, in the order of `Draft.media`.
            objects: what grounding marks refer to; null: they are text like any other.
            video_fps: frames a second wanted of the videos; null: the build's default.
            thinking: `drop` gives the template no trace and has it told not to think; `keep` gives
                them and has it told to think; `toggle` tells it to where there is a trace. It is
                told by `enable_thinking` and `thinking`.

        Raises:
            DataError: turns or marks that cannot be, nothing that is learned, or a template that
                refuses the conversation, or drops, repeats, reorders or changes a content, ends a
                learned turn with no special token, or cannot open several conversations.
        """
        check_turns(sessions)
        marked = MarkedTexts(media_kinds, objects, video_fps)
        opening = marked.opening(turn.text for turns in sessions for turn in turns)
        check_learned(sessions)
        parts: list[Part] = []
        for number, turns in enumerate(sessions):
            shown = open_first(turns, opening) if number == 0 else turns

            def split(
                turn: int, is_reasoning: bool, text: str, shown: Sequence[Turn] = shown
            ) -> list[Part]:
                cut = marked.split_grounding if is_reasoning else marked.split
                return cut(text, shown[turn].is_learned)

            written = self.write(shown, split, thinking)
            if len(sessions) > 1:
                self._check_opening(written)
            parts += written
        return parts

    def write(
        self, turns: Sequence[Turn], split: SplitText, thinking: Thinking = "keep"
    ) -> list[Part]:
        """Parts of one conversation whose contents the caller splits.

        Args:
            turns: in order; their texts are what the template is given.
            split: makes parts of each text.
            thinking: as for `session_parts`.

        Raises:
            DataError: as for `session_parts`.
        """
        if thinking == "drop":
            turns = [turn._replace(reasoning=None) for turn in turns]
        thinks = thinking == "keep" or any(has_reasoning(turn) for turn in turns)
        switch = thinks and thinking != "drop"
        values, gaps = self._gaps.find(turns, switch)
        return self._assemble(turns, values, gaps, split, switch)

    def prompt(
        self,
        question: str,
        num_pictures: int = 0,
        *,
        system: str | None = None,
        thinks: bool | None = None,
    ) -> list[int]:
        """Ids of a question and of what asks for its answer.

        Args:
            question: with `<image>` marks, or none: then all pictures open it.
            num_pictures: placeholders wanted.
            system: prompt of the system; null: there is no such turn.
            thinks: what the template is told as `enable_thinking` and `thinking`; null: nothing, so
                that it does what it does of itself.

        Returns:
            ids [n] with exactly `num_pictures` placeholders.

        Raises:
            DataError: marks and pictures differ in number, or a template that refuses the turns,
                has no form that asks for an answer, or does not know to think or not.
        """
        turns = [] if system is None else [Turn("system", system)]
        marked = MarkedTexts(["image"] * num_pictures)
        asked = [*turns, Turn("user", question)]
        opening = marked.opening(turn.text for turn in asked)
        asked = list(open_first(asked, opening))
        if thinks is not None:
            self.check_switch(f"thinking {'on' if thinks else 'off'}")
        if not self._gaps.asked(asked, thinks):
            raise self._gaps.refusal(
                "asks for no answer where add_generation_prompt is true, so that a model could not "
                "be asked"
            )
        values, gaps = self._gaps.find(asked, thinks, asks=True)
        parts: list[Part] = []
        for value, gap in zip([*values, None], gaps, strict=True):
            parts += self._own(gap, False)
            if value is not None:
                parts += marked.split(value.text, False)
        return encode_parts(self._tokenizer, parts)[0]

    def _assemble(
        self,
        turns: Sequence[Turn],
        values: Sequence[Value],
        gaps: Sequence[str],
        split: SplitText,
        thinks: bool,
    ) -> list[Part]:
        parts: list[Part] = []
        previous: Value | None = None
        for value, gap in zip([*values, None], gaps, strict=True):
            if previous is not None and value is not None and previous.turn == value.turn:
                # Between a trace and its answer.
                parts += self._own(gap, turns[value.turn].is_learned)
            else:
                opening = self._opening(turns, value.turn, gap, thinks) if value is not None else ""
                own = gap.removesuffix(opening)
                ends_learned = previous is not None and turns[previous.turn].is_learned
                parts += self._closing(own) if ends_learned else self._own(own, False)
                parts += self._own(opening, True)
            if value is not None:
                parts += split(value.turn, value.is_reasoning, value.text)
            previous = value
        return parts

    def _opening(self, turns: Sequence[Turn], number: int, gap: str, thinks: bool) -> str:
        """What the assistant itself writes before its first content: the end of `gap` that is not
        there when the template asks for an answer."""
        turn = turns[number]
        if turn.role != "assistant" or not turn.is_learned:
            return ""
        if thinks not in self._openings:
            self._openings[thinks] = self._asking(thinks)
        # Nearly always, and then nothing has to be rendered.
        if self._openings[thinks] and gap.endswith(self._openings[thinks]):
            return ""
        asked = self._gaps.asked(turns[:number], thinks)
        return gap.removeprefix(asked) if asked and gap.startswith(asked) else ""

    def _asking(self, thinks: bool) -> str:
        """What asking adds behind a question; empty if it is not simply added there."""
        values = [Value(0, "", False)]
        try:
            asked, told = (
                self._gaps.render(_PROBE[:1], values, ["question"], thinks, asks)
                for asks in (True, False)
            )
        except DataError:
            # It wants more turns than this one.
            return ""
        return asked.removeprefix(told) if asked.startswith(told) else ""

    def _closing(self, gap: str) -> list[Part]:
        """What follows a learned turn, of which the special token that ends it is learned too."""
        _, end = self._ending(gap)
        pieces = self._tokenizer.split_template(gap)
        return [*self._parts_of(pieces[:end], True), *self._parts_of(pieces[end:], False)]

    def _ending(self, gap: str) -> tuple[int, int]:
        """Id of the special token that ends a turn, and how many pieces of `gap` end with it."""
        pieces = self._tokenizer.split_template(gap)
        blank = bool(pieces) and isinstance(pieces[0], str) and not pieces[0].strip()
        end = 2 if blank else 1
        token = pieces[end - 1] if len(pieces) >= end else ""
        if isinstance(token, str):
            raise self._gaps.refusal(
                "ends a learned turn with no special token of the tokenizer, so that a model would "
                "not learn to stop"
            )
        return token, end

    def _check_opening(self, parts: Sequence[Part]) -> None:
        """Raises DataError unless a conversation among others can be told to begin here."""
        own = [int(part.ids[0]) for part in parts if isinstance(part, Tokens)]
        if not isinstance(parts[0], Tokens) or own.count(int(parts[0].ids[0])) != 1:
            raise self._gaps.refusal(
                "opens a conversation with no special token of its own, so that several sessions "
                "in one sample would run into each other"
            )

    def _own(self, text: str, learned: bool) -> list[Part]:
        return self._parts_of(self._tokenizer.split_template(text), learned)

    def _parts_of(self, pieces: Sequence[str | int], learned: bool) -> list[Part]:
        if self._tokenizer.image_id in pieces:
            raise self._gaps.refusal(
                "writes a picture's placeholder itself; expected <image> in a text"
            )
        return [
            Text(piece, learned)
            if isinstance(piece, str)
            else Tokens(np.array([piece], dtype=np.int32), learned)
            for piece in pieces
        ]
