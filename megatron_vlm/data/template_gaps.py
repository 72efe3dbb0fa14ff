"""What a chat template itself writes: its own text before, between and after the contents.

A template is rendered with a sentinel in the place of every content, one that no template can
know. What stands between the sentinels is the template's own.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vlm.data.chat import Turn, has_reasoning
from megatron_vlm.data.template_sandbox import compile_template
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.errors import DataError


@dataclass(frozen=True, slots=True)
class Value:
    """A text that a template is given."""

    turn: int
    text: str
    is_reasoning: bool


class TemplateGaps:
    """A template that can be rendered, and taken apart again."""

    def __init__(self, text: TemplateText) -> None:
        """Compile it.

        Raises:
            DataError: no valid template, or one that reads files.
        """
        self.text = text
        self._render = compile_template(text.source, text.name)

    def render(
        self,
        turns: Sequence[Turn],
        values: Sequence[Value],
        texts: Sequence[str],
        thinks: bool | None,
        asks: bool = False,
    ) -> str:
        """The conversation as the template writes it.

        Args:
            turns: give the roles.
            values: what each text is.
            texts: in the place of the values' own.
            thinks: told as `enable_thinking` and `thinking`; null: neither is there.
            asks: whether it ends by asking for an answer.

        Raises:
            DataError: whatever goes wrong in the template.
        """
        messages: list[dict[str, str]] = [{"role": turn.role} for turn in turns]
        for value, text in zip(values, texts, strict=True):
            field = "reasoning_content" if value.is_reasoning else "content"
            messages[value.turn][field] = text
        switch = {} if thinks is None else {"enable_thinking": thinks, "thinking": thinks}
        return self._render(
            {
                **self.text.special_tokens,
                "messages": messages,
                "add_generation_prompt": asks,
                **switch,
                "tools": None,
                "documents": None,
            }
        )

    def find(
        self, turns: Sequence[Turn], thinks: bool | None, asks: bool = False
    ) -> tuple[list[Value], list[str]]:
        """The values that the template writes, and its own text before each and after the last.

        A template may leave out traces before the last learned turn, as many do, and strip white
        space from contents, which the values then lack.

        Raises:
            DataError: it refuses the conversation, or drops, repeats, reorders or changes a
                content.
        """
        values: list[Value] = []
        for number, turn in enumerate(turns):
            if turn.reasoning is not None and has_reasoning(turn):
                values.append(Value(number, turn.reasoning, True))
            values.append(Value(number, turn.text, False))
        sentinels = [secrets.token_hex(16) for _ in values]
        rendered = self.render(turns, values, sentinels, thinks, asks)
        kept, gaps = self._split(rendered, turns, values, sentinels)
        if all(value.text == value.text.strip() for value in values):
            return kept, gaps
        # Once more with each content's own white space about it, to see which of it is stripped.
        edges = [_edges(value.text) for value in values]
        texts = [
            before + sentinel + after
            for (before, _, after), sentinel in zip(edges, sentinels, strict=True)
        ]
        rendered = self.render(turns, values, texts, thinks, asks)
        kept_spaced, spaced = self._split(rendered, turns, values, sentinels)
        if kept_spaced != kept:
            raise self.refusal("drops a content that has white space about it")
        return self._stripped(kept, gaps, spaced), gaps

    def asked(self, turns: Sequence[Turn], thinks: bool | None) -> str:
        """What the template writes after the last of these turns to ask for an answer.

        Empty where it has no such form, or takes these for a conversation that nobody would be
        asked to answer.
        """
        contents = [Value(number, "", False) for number in range(len(turns))]
        sentinels = [secrets.token_hex(16) for _ in turns]
        try:
            asked, told = (
                self.render(turns, contents, sentinels, thinks, asks) for asks in (True, False)
            )
        except DataError:
            return ""
        if asked == told:
            return ""
        return asked.rpartition(sentinels[-1])[2] if turns else asked

    def refusal(self, reason: str) -> DataError:
        """The error that says why this template cannot serve."""
        return DataError(
            f"{self.text.name}: {reason}; use another template, or the built-in format"
        )

    def _split(
        self,
        rendered: str,
        turns: Sequence[Turn],
        values: Sequence[Value],
        sentinels: Sequence[str],
    ) -> tuple[list[Value], list[str]]:
        """Cut what was rendered at the sentinels."""
        rest = rendered
        kept, gaps = [], []
        learned = (value.turn for value in values if turns[value.turn].is_learned)
        last = max(learned, default=len(turns))
        for value, sentinel in zip(values, sentinels, strict=True):
            what = "reasoning" if value.is_reasoning else "text"
            name = f"the {what} of turn {value.turn} ({turns[value.turn].role})"
            if sentinel not in rest:
                # Traces of earlier turns are left out on purpose.
                if value.is_reasoning and value.turn < last:
                    continue
                raise self.refusal(f"drops, changes or reorders {name}")
            before, rest = rest.split(sentinel, 1)
            if sentinel in rest:
                raise self.refusal(f"repeats {name}")
            kept.append(value)
            gaps.append(before)
        if any(sentinel in text for sentinel in sentinels for text in (*gaps, rest)):
            raise self.refusal("reorders what was said")
        return kept, [*gaps, rest]

    def _stripped(
        self, values: Sequence[Value], gaps: Sequence[str], spaced: Sequence[str]
    ) -> list[Value]:
        """The values without the white space that the template strips."""
        left = [_edges(value.text)[0] for value in values]
        right = [_edges(value.text)[2] for value in values]
        ends, starts = [""], []
        for gap, found, before, after in zip(gaps, spaced, ["", *right], [*left, ""], strict=True):
            # Templates strip all white space, line breaks, blanks, or nothing.
            tries = [
                (end, start)
                for end in (before, before.rstrip("\n"), before.rstrip(" "), "")
                for start in (after, after.lstrip("\n"), after.lstrip(" "), "")
                if found == end + gap + start
            ]
            if not tries:
                raise self.refusal("changes the white space about contents")
            end, start = tries[0]
            ends.append(end)
            starts.append(start)
        return [
            Value(value.turn, start + value.text.strip() + end, value.is_reasoning)
            for value, start, end in zip(values, starts[:-1], ends[2:], strict=True)
        ]


def _edges(text: str) -> tuple[str, str, str]:
    """A text's leading white space, its core, and its trailing white space."""
    core = text.strip()
    start = text.index(core) if core else len(text)
    return text[:start], core, text[start + len(core) :]
