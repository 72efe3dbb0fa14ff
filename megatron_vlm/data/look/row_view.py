"""A row as the loader gives it, taken apart into what a page shows.

Tokens, targets and positions are those of the `TextBatch`, pixels those of the `PictureBatch`; what
could not be read is blank here as it is in training.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.format import STILL, member_key
from megatron_vlm.data.grounding import RELATIVE_MAX, parse_boxes, parse_points
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.loader import LoadedStep
from megatron_vlm.data.look.entries import read_entry
from megatron_vlm.data.look.painting import painted
from megatron_vlm.data.look.spelling import spell
from megatron_vlm.data.picture_table import PicturePlan
from megatron_vlm.data.row_table import untied_layout
from megatron_vlm.data.rows import Row
from megatron_vlm.data.stream import RowStream
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.data.untie import Slice

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig

_STAMP = re.compile(r"\[([0-9]+\.[0-9]) second\]\s*$")

Kind: TypeAlias = Literal["text", "special", "picture", "padding"]


@dataclass(frozen=True, slots=True)
class DrawnMark:
    """A box or point that a text names."""

    values: tuple[int, ...]
    """x1, y1, x2, y2 of a box, x, y of a point, as they are written."""
    learned: bool


@dataclass(frozen=True, slots=True, eq=False)
class ShownPicture:
    """A picture as the model sees it."""

    ordinal: int
    """Place among the sample's pictures, from 0."""
    grid_h: int
    """Patches along the height."""
    grid_w: int
    """Patches along the width."""
    pixels: NDArray[np.uint8]
    """[height, width, 3], resized to the grid."""
    stored: tuple[int, int]
    """(height, width) as stored, upright."""
    pts: int | None
    """Presentation time of a frame; null: no frame."""
    seconds: str | None
    """The time that the text before a frame gives it."""
    extent: tuple[int, int]
    """(width, height) of the whole picture in the unit that its marks are written in."""
    marks: list[DrawnMark] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Tokens that are shown as one."""

    kind: Kind
    first: int
    """Place of the first within the row."""
    tokens: int
    text: str
    """Of a text or special token."""
    learned: bool
    """Whether they are targets."""
    picture: ShownPicture | None = None


@dataclass(frozen=True, slots=True)
class ShownSample:
    """Where a sample comes from."""

    source: str
    """Name of its source in the run."""
    path: str
    """Folder of its data set."""
    number: int
    """Place in the data set."""
    origin: str
    """The source's file that it comes from."""
    member: str
    """Its member in the shard, without its ending."""
    shard: str
    entry: bytes | None
    """What it was in its source, as JSON."""
    offset: int
    """First of its tokens that the row holds."""
    length: int
    """Of its tokens in the row."""
    total: int
    """Of all its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """What attends to itself alone: a sample, or all samples of an untied row."""

    first: int
    """Place of its first token within the row."""
    length: int
    """Real tokens, as planned."""
    padded: int
    """Tokens up to the next segment."""
    samples: tuple[ShownSample, ...]
    spans: list[Span]
    headings: dict[int, str]
    """What begins at a place in the row: the chunks of an untied row."""
    failure: str | None
    """Why it is blank, if it is."""
    several: bool
    """Whether boxes and points of it could be of more than one picture."""


@dataclass(frozen=True, slots=True, eq=False)
class RowView:
    """One row."""

    number: int
    """Place among the rows of the run."""
    tokens: NDArray[np.int64]
    """[seq_length] ids."""
    positions: NDArray[np.int64]
    """[seq_length]"""
    learned: NDArray[np.bool_]
    """[seq_length] whether each token is a target, for the one before it."""
    segments: list[Segment]
    untied: bool
    filler: int
    """Tokens left over at the end."""


def view_row(
    step: LoadedStep,
    stream: RowStream,
    readers: Sequence[SampleReader],
    tokenizer: Tokenizer,
    vision: VisionConfig | None,
) -> RowView:
    """Take a loaded row apart.

    Args:
        step: of one row and one process.
        stream: what it was planned from.
        readers: of the stream's sources.
        tokenizer: of all of them.
        vision: the encoder's geometry; null for a text-only model.
    """
    reasons = {number: f"{name} ({reason})" for number, name, reason in step.failures}
    failed = np.zeros(len(step.plan.document_tokens), bool)
    failed[list(reasons)] = True
    # As in training, once all ranks agree on what could not be read.
    step = step.without(failed, readers[0].index.special_ids.pad)
    (micro,), (text,) = step.plan.micro_batches[0], step.texts
    (row,) = micro.rows
    assert text is not None
    tokens, positions = text.tokens.numpy(), text.position_ids.numpy()
    learned = np.zeros(len(tokens), bool)
    learned[1:] = text.loss_mask.numpy()[:-1] > 0

    pixels = step.pictures.pixel_values.split(step.pictures.grid_hw.prod(1).tolist())
    shown: dict[int, ShownPicture] = {}
    of_document: dict[int, list[PicturePlan]] = {}
    for place, part in zip(step.pictures.indices.tolist(), pixels, strict=True):
        planned = step.plan.pictures[place]
        assert vision is not None
        of_document.setdefault(planned.document, []).append(planned)
        shown[planned.start] = _shown(planned, part.numpy(), readers[planned.source].index, vision)

    segments: list[Segment] = []
    filler = 0
    bounds = micro.cu_seqlens.tolist()
    for place, number in enumerate(micro.documents.tolist()):
        start, stop = bounds[place], bounds[place + 1]
        if number < 0:
            filler = stop - start
            continue
        members = range(len(row.sample)) if row.untied else range(place, place + 1)
        length = int(row.length[list(members)].sum())
        headings = _chunks(stream, row, start) if row.untied else {}
        spans = _spans(
            tokens, learned, range(start, stop), 0 if failed[number] else length,
            of_document.get(number, ()), shown, tokenizer, frozenset(headings),
        )  # fmt: skip
        _attach_marks(spans)
        samples = tuple(_sample(stream, readers, row, member) for member in members)
        pictures = sum(span.picture is not None for span in spans)
        segments.append(
            Segment(
                start, length, stop - start, samples, spans, headings, reasons.get(number),
                several=pictures > 1,
            )
        )  # fmt: skip
    return RowView(row.number, tokens, positions, learned, segments, row.untied, filler)


def _shown(
    planned: PicturePlan, patches: NDArray[np.float32], index: DatasetIndex, vision: VisionConfig
) -> ShownPicture:
    columns = index.columns
    place = int(columns.sample_picture_start[planned.sample]) + planned.ordinal
    pts = int(columns.picture_pts[place])
    pixels = painted(patches, planned.grid_h, planned.grid_w, vision)
    height, width = pixels.shape[:2]
    relative = index.coordinates["convention"] == "relative"
    return ShownPicture(
        ordinal=planned.ordinal,
        grid_h=planned.grid_h,
        grid_w=planned.grid_w,
        pixels=pixels,
        stored=(int(columns.picture_height[place]), int(columns.picture_width[place])),
        pts=None if pts == STILL else pts,
        seconds=None,
        extent=(RELATIVE_MAX, RELATIVE_MAX) if relative else (width, height),
    )


def _spans(
    tokens: NDArray[np.int64],
    learned: NDArray[np.bool_],
    place: range,
    length: int,
    pictures: Sequence[PicturePlan],
    shown: dict[int, ShownPicture],
    tokenizer: Tokenizer,
    breaks: frozenset[int],
) -> list[Span]:
    """Of a segment that lies at `place`, in order; its first `length` tokens are real."""
    spans: list[Span] = []
    end = place.start + length

    def write(first: int, stop: int) -> None:
        if first == stop:
            return
        changes = np.flatnonzero(learned[first + 1 : stop] != learned[first : stop - 1]) + 1
        bounds = {*changes.tolist(), *(at - first for at in breaks)}
        for found in spell(tokenizer, tokens[first:stop].tolist(), bounds):
            kind: Kind = "special" if found.special else "text"
            spans.append(Span(kind, first, found.tokens, found.text, bool(learned[first])))
            first += found.tokens

    at = place.start
    for planned in pictures if length else ():
        write(at, planned.start)
        picture = shown[planned.start]
        if picture.pts is not None:
            before = _STAMP.search("".join(span.text for span in spans[-24:]))
            picture = replace(picture, seconds=before and before[1])
        spans.append(Span("picture", planned.start, planned.tokens, "", False, picture))
        at = planned.start + planned.tokens
    write(at, end)
    if place.stop > end:
        spans.append(Span("padding", end, place.stop - end, "", False))
    return spans


def _attach_marks(spans: Sequence[Span]) -> None:
    """Give boxes and points to the picture before the text that names them, else to the first."""
    pictures = [span.picture for span in spans if span.picture is not None]
    if not pictures:
        return
    current, text, learned = pictures[0], "", False

    def close() -> None:
        for values in (*parse_boxes(text), *parse_points(text)):
            current.marks.append(DrawnMark(values, learned))

    for span in spans:
        if span.kind == "text" and span.learned == learned:
            text += span.text
            continue
        close()
        text, learned = (span.text if span.kind == "text" else ""), span.learned
        current = span.picture or current
    close()


def _chunks(stream: RowStream, row: Row, first: int) -> dict[int, str]:
    """What of an untied row begins where."""
    headings: dict[int, str] = {}
    at = first
    for piece in untied_layout(stream, row).pieces:
        if isinstance(piece, Slice):
            total = int(row.length[piece.document])
            part = "whole" if piece.length == total else f"tokens {piece.start}-{piece.stop - 1}"
            headings[at] = f"document {piece.document + 1}, {part} of {total}"
        at += piece.length
    return headings


def _sample(
    stream: RowStream, readers: Sequence[SampleReader], row: Row, member: int
) -> ShownSample:
    number, sample = int(row.source[member]), int(row.sample[member])
    index, source = readers[number].index, stream.sources[number]
    columns = index.columns
    key = member_key(int(columns.sample_entry[sample]), int(columns.sample_draft[sample]))
    return ShownSample(
        source=source.name,
        path=str(index.path),
        number=sample,
        origin=index.origins[int(columns.sample_origin[sample])],
        member=key,
        shard=index.shard_names[int(columns.sample_shard[sample])],
        entry=read_entry(index, sample),
        offset=int(row.offset[member]),
        length=int(row.length[member]),
        total=int(source.samples.lengths[sample]),
    )
