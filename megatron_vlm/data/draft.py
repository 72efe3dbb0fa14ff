"""What a source gives: samples as text, marks and media, before there are tokens.

Every kind of source is read into the same few parts, and one builder turns them into tokens. A
source decides what is learned; the builder decodes media, measures them, and only then writes out
coordinates, which may be pixels of the picture as the model will see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

SampleKind: TypeAlias = Literal["conversation", "document", "preference", "trajectory"]
"""What a data set holds. A preference set's samples come in pairs: chosen, then rejected."""


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text; no special token can come of it, whatever it spells."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Special:
    """One special token."""

    role: str
    """A key of `tokenizer.SPECIAL_TOKENS`."""
    learned: bool


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Text that came as token ids of the set's own tokenizer."""

    ids: NDArray[np.int32]
    learned: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """Where a picture goes; never learned."""

    medium: int
    """Its place in `Draft.media`."""


@dataclass(frozen=True, slots=True)
class Video:
    """Where a video goes: its sampled frames, each after its time as text; never learned."""

    medium: int
    """Its place in `Draft.media`."""
    fps: float | None = None
    """Frames a second wanted; null: the build's default."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An object of a picture, written out as text once the picture's size is known."""

    form: str
    """How: `box`, `point`, ... (`grounding.FORMS`)."""
    target: dict[str, Any]
    """The object as its source gives it, coordinates in pixels of the picture as it is stored."""
    medium: int
    """The picture's place in `Draft.media`."""
    learned: bool


Part: TypeAlias = Text | Special | Tokens | Picture | Video | Mark


@dataclass(frozen=True, slots=True)
class Medium:
    """An encoded picture or video that a sample refers to."""

    name: str
    """What errors call it."""
    size: int
    """Bytes, known before any of them is read."""
    read: Callable[[], bytes]
    """Reads it. Raises DataError, naming it, when that fails."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One sample before it is encoded."""

    parts: Sequence[Part]
    media: Sequence[Medium] = ()
    entry: bytes = b"{}"
    """JSON kept beside the sample: what it was in its source, without media."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a source. Cheap to make: all work on it is in `drafts`."""

    number: int
    """Place in the source, from 0; the same whenever the same source is read."""
    origin: int
    """Place in `Source.origins` of the file that it comes from."""
    id: Any = None
    """What its source calls it, for messages."""
    drafts: Callable[[], Sequence[Draft]] = field(default=tuple, repr=False)
    """Its samples; called on a worker thread. Raises DataError with the reason why it is bad."""


class Source(Protocol):
    """A collection of entries in a fixed order, which can be read again from any entry on."""

    kind: SampleKind
    origins: Sequence[str]
    """Names of its files, in order."""
    total: int | None
    """Entries, if that is known before all are read."""

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Entries from number `start` on.

        Raises:
            DataError: a file cannot be read any further; names it.
        """
        ...
