"""Conversations as JSON: LLaVA's `conversations`, `messages`, and several sessions in one sample.

A turn is `{"from", "value"}` or `{"role", "content"}`; a content is a text with `<image>` and
`<video>` where media go, or a list of parts as chat interfaces take it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vlm.data.chat import Role, Turn, session_parts
from megatron_vlm.data.draft import Draft, Medium
from megatron_vlm.data.marks import IMAGE_MARK, VIDEO_MARK
from megatron_vlm.data.sources.media import FindMedium, MediaFolder, MediumKind, entry_json
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.records import RecordSource, open_records
from megatron_vlm.errors import DataError

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""What sources call the speakers."""

_MARK = re.compile(f"{re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)}")
_KINDS: dict[str, MediumKind] = {
    **{IMAGE_MARK: "image", VIDEO_MARK: "video"},
    **{"image": "image", "image_url": "image", "input_image": "image"},
    **{"video": "video", "video_url": "video", "input_video": "video"},
}
_SHOWN = ("image", "images", "video", "videos", "objects")
"""Fields of an entry that say what a sample shows."""
_EACH_KIND: tuple[MediumKind, ...] = ("image", "video")
_SHAPES = ("conversations", "messages", "sessions")


def open_conversations(path: Path, options: SourceOptions) -> RecordSource:
    """Conversations from a JSON list, JSON lines or Parquet.

    Args:
        path: a file, or a folder of such files.
        options: `image_root`, `fps`, `thinking`, `template`.

    Raises:
        DataError: nothing there, unreadable, or no media root.
    """
    files, names = open_records(path, '{"id", "image" or "images", "conversations"}')
    folder = MediaFolder.open(media_root(path, options))
    to_drafts = partial(conversation_drafts, find=folder.find, options=options)
    return RecordSource("conversation", files, names, to_drafts)


def media_root(path: Path, options: SourceOptions) -> Path:
    """Where paths of media start from."""
    if options.image_root is not None:
        return options.image_root
    return path if path.is_dir() else path.parent


def conversation_drafts(
    entry: Any, find: FindMedium, options: SourceOptions, kept: Any = None
) -> Sequence[Draft]:
    """The sample of one entry.

    Args:
        entry: one of `conversations`, `messages` and `sessions`; `image`, `images`, `video`,
            `videos`; `objects` that grounding marks refer to; `fps` of its videos.
        find: gives its media.
        options: `fps`, `thinking`, `template`.
        kept: what is kept beside the sample instead of the entry.

    Raises:
        DataError: the reason why it cannot be a sample; names the field.
    """
    if not isinstance(entry, dict):
        raise DataError(f"entry is {type(entry).__name__}; expected an object")
    content = Content(find)
    content.add_listed(entry)
    sessions = _sessions(entry, content)
    beside = entry_json(entry if kept is None else kept)
    return [content.draft(sessions, options, beside, objects_of(entry))]


@dataclass(slots=True)
class Content:
    """The texts and media of one sample as they are met, in order."""

    find: FindMedium
    media: list[tuple[MediumKind, Medium]] = field(default_factory=list)
    listed: dict[MediumKind, deque[Any]] = field(default_factory=lambda: defaultdict(deque))
    """What the entry lists beside its turns, and no mark has taken so far."""
    fps: set[float] = field(default_factory=set)

    def add_listed(self, entry: dict[str, Any]) -> None:
        """Take in the fields `image`, `images`, `video`, `videos` and `fps`."""
        _check_spelling(entry)
        for kind in _EACH_KIND:
            self.listed[kind] += listed_media(entry, kind)
        for name in ("fps", "video_fps"):
            if entry.get(name) is not None:
                self.fps.add(_positive(entry[name], name))

    def turn(self, given: Any, place: str) -> Turn:
        """One turn; its media join the others.

        Args:
            given: as its source has it.
            place: what errors call it.

        Raises:
            DataError: the reason why it is none.
        """
        if not isinstance(given, dict):
            raise DataError(f"{place}: is {type(given).__name__}; expected an object")
        speaker_key, text_key = ("from", "value") if "from" in given else ("role", "content")
        speaker = given.get(speaker_key)
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise DataError(
                f"{place}.{speaker_key}: {str(speaker)[:60]!r}; expected one of {', '.join(ROLES)}"
            )
        text = self.text(given.get(text_key), f"{place}.{text_key}")
        reasoning = next(
            (given[k] for k in ("reasoning_content", "reasoning") if given.get(k) is not None), None
        )
        if reasoning is not None and not isinstance(reasoning, str):
            raise DataError(
                f"{place}.reasoning_content: is {type(reasoning).__name__}; expected a string"
            )
        turn = Turn(role, text, reasoning, _learned(given, place))
        if turn.is_learned and not (text + (reasoning or "")).strip():
            raise DataError(f"{place}.{text_key}: an empty answer; it would teach to say nothing")
        return turn

    def text(self, content: Any, place: str) -> str:
        """A content as one text with marks.

        Raises:
            DataError: neither a text nor a list of parts.
        """
        if isinstance(content, str):
            for mark in _MARK.findall(content):
                self._take(_KINDS[mark])
            return content
        if not isinstance(content, list):
            raise DataError(
                f"{place}: is {type(content).__name__}; expected a string or a list of parts"
            )
        return "".join(self._part(part, f"{place}[{i}]") for i, part in enumerate(content))

    def draft(
        self,
        sessions: Sequence[Sequence[Turn]],
        options: SourceOptions,
        beside: bytes,
        objects: Sequence[Any] | None = None,
    ) -> Draft:
        """The sample, once all turns are read.

        Args:
            sessions: the turns.
            options: `fps`, `thinking`, `template`.
            beside: kept beside it.
            objects: what grounding marks refer to; null: there are none.

        Raises:
            DataError: what is read does not make a sample.
        """
        for kind in _EACH_KIND:
            while self.listed[kind]:
                self._take(kind)
        if len(self.fps) > 1:
            raise DataError("fps: several values; expected one for all videos of a sample")
        kinds = [kind for kind, _ in self.media]
        fps = next(iter(self.fps), options.fps)
        if options.template is not None:
            parts = options.template.session_parts(
                sessions, kinds, objects=objects, video_fps=fps, thinking=options.thinking.mode
            )
        else:
            parts = session_parts(
                sessions, kinds, objects=objects, video_fps=fps, thinking=options.thinking
            )
        return Draft(tuple(parts), tuple(medium for _, medium in self.media), beside)

    def _part(self, part: Any, place: str) -> str:
        if isinstance(part, str):
            return self.text(part, place)
        if not isinstance(part, dict):
            raise DataError(f"{place}: is {type(part).__name__}; expected an object")
        kind_name = part.get("type")
        if kind_name in ("text", "input_text", "output_text"):
            if not isinstance(part.get("text"), str):
                raise DataError(f"{place}.text: expected a string")
            return self.text(part["text"], f"{place}.text")
        kind = _KINDS.get(kind_name) if isinstance(kind_name, str) else None
        if kind is None:
            raise DataError(
                f"{place}.type: {str(kind_name)[:60]!r}; expected text, image, image_url or video"
            )
        if part.get("fps") is not None:
            self.fps.add(_positive(part["fps"], f"{place}.fps"))
        keys = (kind_name, kind, f"{kind}_url", "path", "url")
        named = next((part[key] for key in keys if part.get(key) is not None), None)
        if named is None and isinstance(part.get("bytes"), bytes):
            named = part
        if named is None:
            self._take(kind)
        else:
            self.media.append((kind, self.find(named, kind)))
        return IMAGE_MARK if kind == "image" else VIDEO_MARK

    def _take(self, kind: MediumKind) -> None:
        # A mark too many is found when marks and media are counted.
        if self.listed[kind]:
            self.media.append((kind, self.find(self.listed[kind].popleft(), kind)))


def listed_media(entry: dict[str, Any], kind: MediumKind) -> list[Any]:
    """What an entry lists under `image` or `images` (`video` or `videos`).

    Raises:
        DataError: both are there, or neither a name nor a list of names.
    """
    given = [name for name in (kind, f"{kind}s") if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"{kind}, {kind}s: both are given; keep one")
    if not given:
        return []
    value = entry[given[0]]
    names = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(name, str | dict) and name for name in names):
        raise DataError(f"{given[0]}: expected a path or a list of paths")
    return names


def _check_spelling(entry: dict[str, Any]) -> None:
    """Raises DataError for a field that is all but one of `_SHOWN`: what it lists would be lost.

    Other fields that nothing reads, such as identifiers, are kept beside the sample.
    """
    for name in entry:
        if name in _SHOWN:
            continue
        near = difflib.get_close_matches(name.casefold(), _SHOWN, n=1, cutoff=0.86)
        if near:
            raise DataError(f"{name}: no such field; did you mean {near[0]}?")


def objects_of(entry: dict[str, Any]) -> list[Any] | None:
    """What grounding marks of an entry refer to; null if it lists nothing.

    Raises:
        DataError: not a list.
    """
    objects = entry.get("objects")
    if objects is not None and not isinstance(objects, list):
        raise DataError(f"objects: is {type(objects).__name__}; expected a list")
    return objects


def _sessions(entry: dict[str, Any], content: Content) -> list[list[Turn]]:
    given = [name for name in _SHAPES if entry.get(name) is not None]
    if len(given) > 1:
        raise DataError(f"{', '.join(given)}: more than one is given; keep one")
    name = given[0] if given else "conversations"
    value = entry.get(name)
    if name != "sessions":
        return [turns_of(value, name, content)]
    if not isinstance(value, list) or not value:
        raise DataError("sessions: expected a list of at least one conversation")
    sessions = []
    for i, session in enumerate(value):
        place = f"sessions[{i}]"
        if isinstance(session, dict):
            inner = next((k for k in ("messages", "conversations") if k in session), "messages")
            session, place = session.get(inner), f"{place}.{inner}"
        sessions.append(turns_of(session, place, content))
    return sessions


def turns_of(value: Any, place: str, content: Content) -> list[Turn]:
    """The turns of one conversation.

    Raises:
        DataError: not a list of turns; names `place`.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: expected a list of at least one turn")
    return [content.turn(turn, f"{place}[{i}]") for i, turn in enumerate(value)]


def _learned(given: dict[str, Any], place: str) -> bool | None:
    # `weight` is what fine-tuning interfaces call it.
    for name in ("learned", "weight"):
        value = given.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise DataError(f"{place}.{name}: {str(value)[:40]!r}; expected true or false")
        return bool(value)
    return None


def _positive(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{place}: is {type(value).__name__}; expected frames a second")
    if not 0 < value < math.inf:
        raise DataError(f"{place}: {value}; expected more than 0 frames a second")
    return float(value)
