"""Marks in a text: where a sample's pictures, videos and grounded objects go.

`<image>` and `<video>` take the sample's media of their kind one after another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

from megatron_vlm.data.draft import Part, Picture, Video
from megatron_vlm.data.grounding import split_marks
from megatron_vlm.errors import DataError

MediaKind: TypeAlias = Literal["image", "video"]

IMAGE_MARK = "<image>"
"""What a text holds where a picture goes."""

VIDEO_MARK = "<video>"
"""What a text holds where a video goes; in a sample without videos it is text like any other."""

_MARKS: dict[MediaKind, str] = {"image": IMAGE_MARK, "video": VIDEO_MARK}
_PLURALS: dict[MediaKind, str] = {"image": "pictures", "video": "videos"}


class MarkedTexts:
    """Splits the texts of one sample, in order, at their marks."""

    def __init__(
        self,
        media_kinds: Sequence[MediaKind],
        objects: Sequence[Any] | None = None,
        video_fps: float | None = None,
    ) -> None:
        """Start a sample.

        Args:
            media_kinds: what each of its media is, in the order of `Draft.media`.
            objects: its grounded objects; null: no text of it has grounding marks.
            video_fps: frames a second wanted of its videos; null: the build's default.
        """
        self._media: dict[MediaKind, list[int]] = {
            kind: [i for i, found in enumerate(media_kinds) if found == kind] for kind in _MARKS
        }
        self._objects = objects
        self._video_fps = video_fps
        self._placed = dict.fromkeys(self._media, 0)
        kinds = [kind for kind in self._media if kind == "image" or self._media[kind]]
        self._pattern = re.compile("(" + "|".join(_MARKS[kind] for kind in kinds) + ")")
        self._opening = "".join(_MARKS[kind] for kind in media_kinds)

    def opening(self, texts: Iterable[str]) -> str:
        """What has to be put before the first question: the marks of all media, if no text has one.

        Raises:
            DataError: marks and media differ in number.
        """
        found = [mark for text in texts for mark in self._pattern.findall(text)]
        if not found and self._opening:
            return self._opening + "\n"
        for kind, mark in _MARKS.items():
            marks, media = found.count(mark), len(self._media[kind])
            if marks != media:
                raise DataError(
                    f"{marks} {mark} marks but {media} {_PLURALS[kind]}; expected as many marks as "
                    f"{_PLURALS[kind]}, or none"
                )
        return ""

    def split(self, text: str, learned: bool) -> list[Part]:
        """Parts of the next text. Its media are never learned.

        Raises:
            DataError: a grounding mark that cannot be resolved.
        """
        parts: list[Part] = []
        for i, piece in enumerate(self._pattern.split(text)):
            if i % 2:
                parts.append(self._next("image" if piece == IMAGE_MARK else "video"))
            else:
                parts += self.split_grounding(piece, learned)
        return parts

    def split_grounding(self, text: str, learned: bool) -> list[Part]:
        """Parts of a text in which no medium can stand: `<image>` and `<video>` are text there."""
        return split_marks(text, learned, self._objects, self._media["image"])

    def _next(self, kind: MediaKind) -> Part:
        medium = self._media[kind][self._placed[kind]]
        self._placed[kind] += 1
        return Picture(medium) if kind == "image" else Video(medium, self._video_fps)
