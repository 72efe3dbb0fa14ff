"""From a source's drafts to samples as they go into shards: media checked, text as tokens.

Whatever is wrong with a draft becomes the reason why it is left out. All work on an entry is a
function of that entry alone, so that threads may share it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.chat import encode_parts
from megatron_vlm.data.draft import (
    Draft,
    Entry,
    Mark,
    Part,
    Picture,
    SampleKind,
    Text,
    Tokens,
    Video,
)
from megatron_vlm.data.encode_media import (
    MAX_ENCODED_BYTES,
    CheckedPicture,
    EntryMedia,
    StoredMedium,
)
from megatron_vlm.data.format import DEFAULT_VIDEO_FPS, DEFAULT_VIDEO_TOKENS, STILL
from megatron_vlm.data.geometry import PictureRule, target_size
from megatron_vlm.data.grounding import resolve_marks
from megatron_vlm.data.ordered import Reserve
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.data.video import timestamp
from megatron_vlm.errors import DataError

MAX_LENGTH = 1 << 24
"""Most characters, or tokens that came as ids, of one sample: beyond any model's context. Our
choice."""


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """How drafts become samples. All of it decides what a model is shown."""

    tokenizer: Tokenizer
    seen: PictureRule | None = None
    """How the model resizes pictures: coordinates are written in pixels of the result; null: they
    are thousandths of a picture's sides."""
    count_points: bool = False
    """Counts list their objects' points before the number."""
    video_fps: float = DEFAULT_VIDEO_FPS
    """Frames a second taken from videos that name none."""
    video_max_tokens: int = DEFAULT_VIDEO_TOKENS
    """Most language tokens of a video."""
    template: TemplateText | None = None
    """What the source wrote its dialogues by; null: the built-in format."""


class PlacedPicture(NamedTuple):
    """A picture, or a frame of a video, where a sample shows it."""

    medium: int
    """Its place in `EncodedEntry.media`."""
    height: int
    width: int
    position: int
    """Of its placeholder among the sample's text tokens."""
    max_tokens: int
    """Most language tokens; 0: as many as the model's rule gives."""
    pts: int
    """Presentation time of a frame; `STILL` for a picture."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A checked sample as it goes into a shard."""

    draft: int
    """Place among the samples of its entry."""
    entry: bytes
    """What it was in its source, as JSON."""
    tokens: NDArray[np.int32]
    """[2, n] ids and loss flags."""
    pictures: list[PlacedPicture]
    digest: bytes
    """SHA-256 of what a model is shown."""


class Rejection(NamedTuple):
    """A sample, or a whole entry, that is left out."""

    entry: int
    """Number of the entry in the source."""
    draft: int | None
    """Place among the samples of the entry; null: all of it."""
    id: Any
    """What the source calls the entry, if it does."""
    origin: int
    """Place in `Source.origins` of the file that it comes from."""
    reason: str


@dataclass(slots=True)
class EncodedEntry:
    """What came of an entry."""

    number: int
    """The entry's place in the source."""
    origin: int
    """Place in `Source.origins` of the file that it comes from."""
    samples: list[EncodedSample] = field(default_factory=list)
    media: list[StoredMedium] = field(default_factory=list)
    """What the samples show, in the order in which it is stored."""
    rejections: list[Rejection] = field(default_factory=list)


def encode_entry(
    entry: Entry, reserve: Reserve, *, kind: SampleKind, settings: EncodeSettings
) -> EncodedEntry:
    """Encode all samples of an entry; the two of a preference pair are taken or left out together.

    Args:
        entry: from a source.
        reserve: called with the bytes of the entry's media before any is read.
        kind: of the source's samples.
        settings: how.

    Raises:
        DataError: memory ran out, which says nothing about the entry.
    """
    encoded = EncodedEntry(entry.number, entry.origin)
    try:
        drafts = entry.drafts()
        if kind == "preference" and len(drafts) != 2:
            raise DataError(f"{len(drafts)} samples; expected two: the chosen, then the rejected")
        if not drafts:
            raise DataError("holds no sample")
        media = EntryMedia(drafts, reserve)
        for place, draft in enumerate(drafts):
            try:
                encoded.samples.append(_encode_draft(draft, place, media, settings))
            except DataError as error:
                if kind == "preference":
                    raise DataError(f"{('chosen', 'rejected')[place]}: {error}") from error
                encoded.rejections.append(_reject(entry, place, error, draft))
        encoded.media = media.stored
        return encoded
    except DataError as error:
        return EncodedEntry(entry.number, entry.origin, rejections=[_reject(entry, None, error)])
    except MemoryError as error:
        # Not the entry's fault: elsewhere, or on fewer threads, it would have been taken.
        raise DataError(
            f"entry {entry.number}: memory ran out while its media were decoded; lower --workers "
            "or take the entry out of the source"
        ) from error


def sample_digest(tokens: NDArray[np.int32], media: Sequence[bytes]) -> bytes:
    """SHA-256 of what a model is shown.

    Args:
        tokens: [2, n] ids and loss flags.
        media: digest of each picture or frame, in order.
    """
    first = hashlib.sha256(tokens.astype("<i4", order="C").tobytes()).digest()
    # Of digests, since a plain concatenation would not tell where one part ends.
    return hashlib.sha256(b"".join([first, *media])).digest()


def frame_digest(video: bytes, pts: int, max_tokens: int) -> bytes:
    """SHA-256 of what is shown of a video, whose own digest is given, at one time."""
    return hashlib.sha256(video + b" %d %d" % (pts, max_tokens)).digest()


class _Shown(NamedTuple):
    """A picture or frame before its placeholder is placed."""

    ordinal: int
    height: int
    width: int
    digest: bytes
    max_tokens: int = 0
    pts: int = STILL


def _encode_draft(
    draft: Draft, place: int, media: EntryMedia, settings: EncodeSettings
) -> EncodedSample:
    media.check_room(place)
    _check_length(draft)
    pictures = {
        part.medium: media.picture(draft.media[part.medium])
        for part in draft.parts
        if isinstance(part, Picture | Mark)
    }
    shown: list[_Shown] = []
    extensions: dict[int, str] = {}
    parts: list[Part] = []
    for part in _write_marks(draft, pictures, settings):
        if isinstance(part, Video):
            parts += _video_parts(part, draft, media, settings, shown, extensions)
            continue
        if isinstance(part, Picture):
            height, width, extension, digest = pictures[part.medium]
            extensions[part.medium] = extension
            shown.append(_Shown(part.medium, height, width, digest))
        parts.append(part)
    ids, flags = encode_parts(settings.tokenizer, parts)
    if not any(flags):
        raise DataError("no token of it is a target, so there is nothing to learn")
    tokens = np.array([ids, flags], dtype=np.int32)
    positions = np.flatnonzero(tokens[0] == settings.tokenizer.image_id)
    stored = media.store(place, extensions)
    placed = [
        PlacedPicture(stored[s.ordinal], s.height, s.width, int(position), s.max_tokens, s.pts)
        for s, position in zip(shown, positions, strict=True)
    ]
    digest = sample_digest(tokens, [s.digest for s in shown])
    return EncodedSample(place, draft.entry, tokens, placed, digest)


def _check_length(draft: Draft) -> None:
    """Raises DataError before much memory goes into a sample that no model could take."""
    tokens = sum(len(part.ids) for part in draft.parts if isinstance(part, Tokens))
    characters = sum(len(part.text) for part in draft.parts if isinstance(part, Text))
    if tokens + characters > MAX_LENGTH:
        raise DataError(
            f"{characters:,} characters and {tokens:,} ready tokens; at most {MAX_LENGTH:,} "
            "together make a sample: cut it into several"
        )
    # Kept as a member of the tar, which could take 8 GB and no more.
    if len(draft.entry) > MAX_ENCODED_BYTES:
        raise DataError(
            f"its JSON has {len(draft.entry):,} bytes; at most {MAX_ENCODED_BYTES:,} are kept "
            "beside a sample: make it smaller"
        )


def _write_marks(
    draft: Draft, pictures: dict[int, CheckedPicture], settings: EncodeSettings
) -> Sequence[Part]:
    if not any(isinstance(part, Mark) for part in draft.parts):
        return draft.parts
    places = range(len(draft.media))
    stored = [(pictures[i].height, pictures[i].width) if i in pictures else None for i in places]
    rule = settings.seen
    if rule is None:
        return resolve_marks(draft.parts, stored, None, "relative", settings.count_points)
    seen = [size and target_size(*size, rule) for size in stored]
    return resolve_marks(draft.parts, stored, seen, "absolute", settings.count_points)


def _video_parts(
    part: Video,
    draft: Draft,
    media: EntryMedia,
    settings: EncodeSettings,
    shown: list[_Shown],
    extensions: dict[int, str],
) -> list[Part]:
    """Each frame after its time; the frames join `shown`."""
    fps = part.fps or settings.video_fps
    medium = draft.media[part.medium]
    frames, extension, digest = media.video(medium, fps, settings.video_max_tokens)
    extensions[part.medium] = extension
    parts: list[Part] = []
    for pts, seconds in zip(frames.pts, frames.seconds, strict=True):
        parts += [Text(timestamp(seconds), False), Picture(part.medium)]
        own = frame_digest(digest, pts, frames.level)
        shown.append(_Shown(part.medium, frames.height, frames.width, own, frames.level, pts))
    return parts


def _reject(
    entry: Entry, place: int | None, error: DataError, draft: Draft | None = None
) -> Rejection:
    identity = entry.id
    if identity is None and draft is not None:
        # Some sources know it only once the entry is read.
        kept = json.loads(draft.entry)
        identity = kept.get("id") if isinstance(kept, dict) else None
    return Rejection(entry.number, place, identity, entry.origin, str(error))
