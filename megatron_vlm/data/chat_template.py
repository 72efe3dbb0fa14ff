"""Chat templates of other models: a conversation in the form that such a model was trained on.

A template is rendered with a sentinel in the place of every content, one that no template can
know. What stands between the sentinels is the template's own and may spell special tokens; the
contents themselves never do.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.chat import Thinking, Turn, check_turns, has_reasoning, open_first
from megatron_vlm.data.draft import Part, Text, Tokens
from megatron_vlm.data.marks import MarkedTexts, MediaKind
from megatron_vlm.data.template_sandbox import MAX_SOURCE, compile_template
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError

_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"
_MAX_CONFIG = 2**26


@dataclass(frozen=True, slots=True)
class _Value:
    """A text that a template is given."""

    turn: int
    text: str
    is_reasoning: bool


class ChatTemplate:
    """A template together with the tokenizer that it is for."""

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        name: str = "chat template",
    ) -> None:
        """Check a template.

        Args:
            source: in Jinja, as `chat_template` of a `tokenizer_config.json`.
            tokenizer: its spellings of special tokens become these tokens.
            special_tokens: what the template may write by name: `bos_token`, `eos_token`, ...
            name: what errors call it.

        Raises:
            DataError: no valid template, or one that reads files.
        """
        self._render = compile_template(source, name)
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens or {})
        self._name = name

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """Read a template as models are published with.

        Args:
            path: a model's folder, its `tokenizer_config.json`, or a file of the template alone,
                whose special tokens are read from a `tokenizer_config.json` beside it, if any.
            tokenizer: the model's.

        Raises:
            DataError: no template there, or one that cannot serve.
        """
        if path.is_dir():
            alone = path / _TEMPLATE_FILE
            path = alone if alone.exists() else path / _CONFIG_FILE
        config: dict[str, Any] = {}
        if path.suffix == ".json":
            config = _read_config(path)
            source = _template_of(config.get("chat_template"))
            if source is None:
                raise DataError(f"{path}: has no chat_template; name a file that holds one")
        else:
            source = _read(path, 4 * MAX_SOURCE)
            beside = path.with_name(_CONFIG_FILE)
            config = _read_config(beside) if beside.exists() else {}
        return cls(source, tokenizer, _special_tokens(config), str(path))

    def parts(
        self,
        turns: Sequence[Turn],
        media_kinds: Sequence[MediaKind] = (),
        *,
        objects: Sequence[Any] | None = None,
        video_fps: float | None = None,
        thinking: Thinking = "keep",
    ) -> list[Part]:
        """Parts of one conversation as the template writes it.

        Learned are the contents of learned turns, the special token that ends such a turn, and of a
        thinking trace also what the template writes around it. A template may leave out traces of
        earlier turns, as many do, and strip white space from contents.

        Args:
            turns: in order.
            media_kinds: what each of the sample's media is, in the order of `Draft.media`.
            objects: what grounding marks refer to; null: they are text like any other.
            video_fps: frames a second wanted of the videos; null: the build's default.
            thinking: `drop` gives the template no trace and has it told not to think; `keep` gives
                them and has it told to think; `toggle` tells it to where there is a trace. It is
                told by `enable_thinking` and `thinking`.

        Raises:
            DataError: turns or marks that cannot be, nothing that is learned, or a template that
                refuses the conversation, or drops, repeats, reorders or changes a content, or ends
                a learned turn with no special token.
        """
        check_turns([turns])
        if not any(turn.is_learned for turn in turns):
            raise DataError("conversation has no learned turn, so there is nothing to learn")
        marked = MarkedTexts(media_kinds, objects, video_fps)
        shown = open_first(turns, marked.opening(turn.text for turn in turns))
        if thinking == "drop":
            shown = [turn._replace(reasoning=None) for turn in shown]
        thinks = thinking == "keep" or any(has_reasoning(turn) for turn in shown)
        switch = thinks and thinking != "drop"
        values, gaps = self._gaps(shown, switch)
        return self._assemble(shown, values, gaps, marked, switch)

    def _gaps(self, turns: Sequence[Turn], thinks: bool) -> tuple[list[_Value], list[str]]:
        """The values that the template writes, and its own text before each and after the last."""
        values: list[_Value] = []
        for number, turn in enumerate(turns):
            if turn.reasoning is not None and has_reasoning(turn):
                values.append(_Value(number, turn.reasoning, True))
            values.append(_Value(number, turn.text, False))
        sentinels = [secrets.token_hex(16) for _ in values]
        kept, gaps = self._split(turns, values, sentinels, sentinels, thinks)
        if all(value.text == value.text.strip() for value in values):
            return kept, gaps
        # Once more with each content's own white space about it, to see which of it is stripped.
        edges = [_edges(value.text) for value in values]
        texts = [
            before + sentinel + after
            for (before, _, after), sentinel in zip(edges, sentinels, strict=True)
        ]
        kept_spaced, spaced = self._split(turns, values, sentinels, texts, thinks)
        if kept_spaced != kept:
            raise self._refuse("drops a content that has white space about it")
        return self._stripped(kept, gaps, spaced), gaps

    def _split(
        self,
        turns: Sequence[Turn],
        values: Sequence[_Value],
        sentinels: Sequence[str],
        texts: Sequence[str],
        thinks: bool,
    ) -> tuple[list[_Value], list[str]]:
        """Render with `texts` for contents, each with its sentinel in it, and cut at these."""
        rest = self._render_turns(turns, values, texts, thinks)
        kept, gaps = [], []
        last = max(value.turn for value in values if turns[value.turn].is_learned)
        for value, sentinel in zip(values, sentinels, strict=True):
            what = "reasoning" if value.is_reasoning else "text"
            name = f"the {what} of turn {value.turn} ({turns[value.turn].role})"
            if sentinel not in rest:
                # Traces of earlier turns are left out on purpose.
                if value.is_reasoning and value.turn < last:
                    continue
                raise self._refuse(f"drops, changes or reorders {name}")
            before, rest = rest.split(sentinel, 1)
            if sentinel in rest:
                raise self._refuse(f"repeats {name}")
            kept.append(value)
            gaps.append(before)
        if any(sentinel in text for sentinel in sentinels for text in (*gaps, rest)):
            raise self._refuse("reorders what was said")
        return kept, [*gaps, rest]

    def _render_turns(
        self,
        turns: Sequence[Turn],
        values: Sequence[_Value],
        texts: Sequence[str],
        thinks: bool,
        opens_answer: bool = False,
    ) -> str:
        messages: list[dict[str, str]] = [{"role": turn.role} for turn in turns]
        for value, text in zip(values, texts, strict=True):
            field = "reasoning_content" if value.is_reasoning else "content"
            messages[value.turn][field] = text
        return self._render(
            {
                **self._special_tokens,
                "messages": messages,
                "add_generation_prompt": opens_answer,
                "enable_thinking": thinks,
                "thinking": thinks,
                "tools": None,
                "documents": None,
            }
        )

    def _stripped(
        self, values: Sequence[_Value], gaps: Sequence[str], spaced: Sequence[str]
    ) -> list[_Value]:
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
                raise self._refuse("changes the white space about contents")
            end, start = tries[0]
            ends.append(end)
            starts.append(start)
        return [
            _Value(value.turn, start + value.text.strip() + end, value.is_reasoning)
            for value, start, end in zip(values, starts[:-1], ends[2:], strict=True)
        ]

    def _assemble(
        self,
        turns: Sequence[Turn],
        values: Sequence[_Value],
        gaps: Sequence[str],
        marked: MarkedTexts,
        thinks: bool,
    ) -> list[Part]:
        parts: list[Part] = []
        previous: _Value | None = None
        for value, gap in zip([*values, None], gaps, strict=True):
            if previous is not None and value is not None and previous.turn == value.turn:
                # Between a trace and its answer.
                parts += self._own(gap, turns[value.turn].is_learned)
            else:
                opening = ""
                if value is not None and value.is_reasoning and turns[value.turn].is_learned:
                    opening = self._opening(turns, value, gap, previous, thinks)
                own = gap.removesuffix(opening)
                ends_learned = previous is not None and turns[previous.turn].is_learned
                parts += self._closing(own) if ends_learned else self._own(own, False)
                parts += self._own(opening, True)
            if value is not None:
                split = marked.split_grounding if value.is_reasoning else marked.split
                parts += split(value.text, turns[value.turn].is_learned)
            previous = value
        return parts

    def _opening(
        self,
        turns: Sequence[Turn],
        value: _Value,
        gap: str,
        previous: _Value | None,
        thinks: bool,
    ) -> str:
        """What the assistant itself writes before a trace: the end of `gap` that is not there when
        the template asks for an answer."""
        earlier = turns[: value.turn]
        sentinels = [secrets.token_hex(16) for _ in earlier]
        contents = [_Value(number, "", False) for number in range(len(earlier))]
        try:
            asked, told = (
                self._render_turns(earlier, contents, sentinels, thinks, opens_answer)
                for opens_answer in (True, False)
            )
        except DataError:
            # A conversation that nobody would be asked to answer.
            return ""
        if asked == told:
            # The template has no form that asks for one.
            return ""
        if previous is not None:
            asked = asked.rpartition(sentinels[previous.turn])[2]
        return gap.removeprefix(asked) if gap.startswith(asked) else ""

    def _closing(self, gap: str) -> list[Part]:
        """What follows a learned turn, of which the special token that ends it is learned too."""
        pieces = self._tokenizer.split_template(gap)
        blank = bool(pieces) and isinstance(pieces[0], str) and not pieces[0].strip()
        end = 2 if blank else 1
        if len(pieces) < end or isinstance(pieces[end - 1], str):
            raise self._refuse(
                "ends a learned turn with no special token of the tokenizer, so that a model would "
                "not learn to stop"
            )
        return [*self._parts_of(pieces[:end], True), *self._parts_of(pieces[end:], False)]

    def _own(self, text: str, learned: bool) -> list[Part]:
        return self._parts_of(self._tokenizer.split_template(text), learned)

    def _parts_of(self, pieces: Sequence[str | int], learned: bool) -> list[Part]:
        if self._tokenizer.image_id in pieces:
            raise self._refuse("writes a picture's placeholder itself; expected <image> in a text")
        return [
            Text(piece, learned)
            if isinstance(piece, str)
            else Tokens(np.array([piece], dtype=np.int32), learned)
            for piece in pieces
        ]

    def _refuse(self, reason: str) -> DataError:
        return DataError(f"{self._name}: {reason}; use another template, or the built-in format")


def _edges(text: str) -> tuple[str, str, str]:
    """A text's leading white space, its core, and its trailing white space."""
    core = text.strip()
    start = text.index(core) if core else len(text)
    return text[:start], core, text[start + len(core) :]


def _read(path: Path, most: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a chat template"
        ) from error
    if len(content) > most:
        raise DataError(f"{path}: more than {most} bytes; expected a chat template")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; expected a chat template") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path, _MAX_CONFIG))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); mend the file") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds {type(config).__name__}; expected an object")
    return config


def _template_of(field: Any) -> str | None:
    """The template of a `chat_template` field: a string, or a list with one called default."""
    if isinstance(field, list):
        named = [t for t in field if isinstance(t, dict) and t.get("name") == "default"]
        field = named[0].get("template") if named else None
    return field if isinstance(field, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, which are spelled out or described."""
    found = {}
    for key, value in config.items():
        spelled = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(spelled, str):
            found[key] = spelled
    return found
