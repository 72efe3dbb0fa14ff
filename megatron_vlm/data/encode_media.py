"""The media of one entry: each is read once, decoded in full once, and stored once.

The samples of an entry may share media, as the two of a preference pair do, and the frames of a
video share their video.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron_vlm.data.draft import Draft, Medium
from megatron_vlm.data.geometry import check_sizes
from megatron_vlm.data.ordered import Reserve
from megatron_vlm.data.pictures import check_picture
from megatron_vlm.data.sources.media import MAX_ENCODED_BYTES
from megatron_vlm.data.video import VideoSample, sample_video
from megatron_vlm.errors import DataError

MAX_ENTRY_BYTES = 4 * MAX_ENCODED_BYTES
"""Most of them that the samples of one entry may have together. Our choice."""

_EXTENSION = re.compile(r"\.([A-Za-z0-9]{2,5})$")


class StoredMedium(NamedTuple):
    """An encoded picture or video as it goes into a shard."""

    draft: int
    """Place in the entry of the sample that it is stored with."""
    ordinal: int
    """Its place in that sample's `Draft.media`."""
    extension: str
    content: bytes


class CheckedPicture(NamedTuple):
    """A picture that was decoded."""

    height: int
    width: int
    extension: str
    digest: bytes
    """SHA-256 of its encoded bytes."""


class CheckedVideo(NamedTuple):
    """A video whose frames were chosen and decoded."""

    frames: VideoSample
    extension: str
    digest: bytes
    """SHA-256 of its encoded bytes."""


class _Content(NamedTuple):
    encoded: bytes
    digest: bytes


class EntryMedia:
    """Reads, checks and stores what the samples of one entry show."""

    def __init__(self, drafts: Sequence[Draft], reserve: Reserve) -> None:
        """Reserve room for all of it; nothing is read yet.

        Args:
            drafts: the entry's samples.
            reserve: called once, with the bytes of all media that will be read.
        """
        self.stored: list[StoredMedium] = []
        """What goes into the shard, in order."""
        # Media are known by identity; the drafts are kept, so that it stays theirs.
        self._drafts = drafts
        self._faults = dict[int, str]()
        self._contents = dict[int, _Content]()
        self._pictures = dict[bytes, CheckedPicture]()
        self._stored_earlier = dict[bytes, int]()
        total = 0
        counted = set[int]()
        for place, draft in enumerate(drafts):
            own = {id(medium): medium for medium in draft.media}
            new = sum(medium.size for known, medium in own.items() if known not in counted)
            fault = _fault(own.values(), total, new)
            if fault:
                self._faults[place] = fault
                continue
            counted |= own.keys()
            total += new
        reserve(total)

    def check_room(self, place: int) -> None:
        """Raises DataError if the media of this draft are more than are read."""
        if place in self._faults:
            raise DataError(self._faults[place])

    def picture(self, medium: Medium) -> CheckedPicture:
        """Read and decode a picture.

        Raises:
            DataError: it cannot be read or is damaged; names it.
        """
        try:
            encoded, digest = self._read(medium)
            if digest not in self._pictures:
                height, width, extension = check_picture(encoded)
                check_sizes(height, width)
                self._pictures[digest] = CheckedPicture(height, width, extension, digest)
            return self._pictures[digest]
        except DataError as error:
            raise _named("image", medium, error) from error

    def video(self, medium: Medium, fps: float, max_tokens: int) -> CheckedVideo:
        """Read a video, choose its frames and decode them.

        Raises:
            DataError: it cannot be read or is damaged; names it.
        """
        try:
            encoded, digest = self._read(medium)
            frames = sample_video(encoded, fps, max_tokens)
            check_sizes(frames.height, frames.width)
        except DataError as error:
            raise _named("video", medium, error) from error
        suffix = _EXTENSION.search(medium.name)
        return CheckedVideo(frames, suffix[1].lower() if suffix else "video", digest)

    def store(self, place: int, extensions: dict[int, str]) -> dict[int, int]:
        """Store what a sample shows, unless an earlier one of the entry has stored it.

        Args:
            place: of the sample's draft in the entry.
            extensions: of each medium that it shows, by place in `Draft.media`, in the order in
                which it shows them.

        Returns:
            Place in `stored` by place in `Draft.media`.
        """
        places = {}
        new = {}
        for ordinal, extension in extensions.items():
            encoded, digest = self._read(self._drafts[place].media[ordinal])
            if digest in self._stored_earlier:
                places[ordinal] = self._stored_earlier[digest]
                continue
            # A sample that lists a medium twice has it twice, as plain WebDataset readers expect.
            places[ordinal] = new[digest] = len(self.stored)
            self.stored.append(StoredMedium(place, ordinal, extension, encoded))
        self._stored_earlier |= new
        return places

    def _read(self, medium: Medium) -> _Content:
        if id(medium) not in self._contents:
            encoded = medium.read()
            self._contents[id(medium)] = _Content(encoded, hashlib.sha256(encoded).digest())
        return self._contents[id(medium)]


def _fault(media: Iterable[Medium], before: int, new: int) -> str | None:
    """Why the media of a sample are not read, if they are too large."""
    total = 0
    for medium in media:
        total += medium.size
        if total > MAX_ENCODED_BYTES:
            return (
                f"{medium.name!r}: {medium.size} bytes, {total} with those before it; at most "
                f"{MAX_ENCODED_BYTES} are read for one sample"
            )
    if before + new > MAX_ENTRY_BYTES:
        return (
            f"{new} bytes of media, {before + new} with the samples before it; at most "
            f"{MAX_ENTRY_BYTES} are read for one entry: make several entries of it"
        )
    return None


def _named(kind: str, medium: Medium, error: DataError) -> DataError:
    message = str(error)
    # What could not be read is named already.
    return (
        error if repr(medium.name) in message else DataError(f"{kind} {medium.name!r}: {message}")
    )
