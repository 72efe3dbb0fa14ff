"""Numbers of data sets under a model, and of the rows that are planned from them.

From metadata alone: no shard is read. Sums run over all samples in blocks; of a large set's
pictures, sizes are taken of an even part, and it is said of which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.format import DATASET_FILE, STILL
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.data.stream import RowStream, Source
from megatron_vlm.errors import DataError

MOST_PICTURES = 1 << 20
"""Pictures of a set whose sizes are looked at. Our choice."""

LENGTH_BINS = 64
"""Bins of the histogram of lengths, even on a logarithmic scale. Our choice."""

PARTS = 128
"""Stretches of the planned rows that the shares of sources are told of. Our choice."""

_AT_ONCE = 1 << 20
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PictureSizes:
    """Sizes of a set's pictures, or of an even part of them; each int64 [n]."""

    height: NDArray[np.int64]
    """Pixels, as stored, upright."""
    width: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Language tokens."""
    every: int
    """1: all pictures; k: every k-th."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceStats:
    """What an epoch of a data set has; of a preference set, of its chosen answers."""

    name: str
    path: str
    kind: str
    samples: int
    """Samples that an epoch draws from, those that are left out included."""
    too_long: int
    """Samples longer than a row."""
    left_out: int
    """Samples that no row can hold, and that are not cut either."""
    text_tokens: int
    """Tokens that are no picture's."""
    picture_tokens: int
    targets: int
    """Target tokens, if every sample is laid out whole."""
    pictures: int
    """Pictures, frames of videos included."""
    frames: int
    """Frames of videos."""
    videos: int
    longest: int
    """Tokens of the longest sample."""
    length_edges: NDArray[np.float64]
    """[LENGTH_BINS + 1] bounds of the histogram's bins, in tokens."""
    length_counts: NDArray[np.int64]
    """[LENGTH_BINS] samples of each length."""
    pictures_per_sample: NDArray[np.int64]
    """[n] samples with 0, 1, ... pictures."""
    sizes: PictureSizes

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return self.text_tokens + self.picture_tokens


@dataclass(frozen=True, slots=True, eq=False)
class RowStats:
    """The first rows of a run as they are planned."""

    seq_length: int
    ended: bool
    """Whether the data end with them."""
    used: NDArray[np.int64]
    """[rows] real tokens of each."""
    padded: NDArray[np.int64]
    """[rows] tokens of each with the padding of its samples."""
    part_rows: NDArray[np.int64]
    """[parts + 1] bounds of the stretches below, in rows."""
    part_tokens: NDArray[np.int64]
    """[parts, sources] real tokens."""
    source_samples: NDArray[np.int64]
    """[sources] samples, or parts of long ones."""

    @property
    def rows(self) -> int:
        """How many were planned."""
        return len(self.used)

    @property
    def source_tokens(self) -> NDArray[np.int64]:
        """[sources] real tokens."""
        return np.asarray(self.part_tokens.sum(axis=0))

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are real."""
        return float(self.used.sum() / (self.rows * self.seq_length))

    @property
    def padding(self) -> float:
        """Share that samples are padded with."""
        return float((self.padded - self.used).sum() / (self.rows * self.seq_length))

    @property
    def tails(self) -> float:
        """Share that lies unused at the ends of rows."""
        return 1.0 - self.fill - self.padding

    def rows_per_epoch(self, source: int, epoch_tokens: int) -> float:
        """Rows until a source has been seen once, at the pace of the planned ones.

        Args:
            source: its number.
            epoch_tokens: tokens of its epoch (`SampleSet.tokens`).
        """
        tokens = int(self.source_tokens[source])
        return epoch_tokens * self.rows / tokens if tokens else float("inf")


def source_stats(source: Source, most_pictures: int = MOST_PICTURES) -> SourceStats:
    """Count what a source's epoch has.

    Args:
        source: of a stream.
        most_pictures: pictures whose sizes are looked at, evenly spread.
    """
    samples = source.samples
    index, columns = samples.index, samples.index.columns
    step = index.num_samples // samples.num_items
    lengths = samples.lengths[::step]
    edges = np.geomspace(1, max(int(lengths.max()), 2), LENGTH_BINS + 1)
    # Every length lies inside, whatever rounding does to the last bound.
    edges[-1] = max(edges[-1], float(lengths.max()))
    counts = np.zeros(LENGTH_BINS, np.int64)
    per_sample = np.zeros(1, np.int64)
    text = total = targets = 0
    for block in _blocks(samples.num_items):
        whole = slice(block.start * step, block.stop * step, step)
        part = lengths[block]
        counts += np.histogram(part, edges)[0]
        pictures = np.diff(columns.sample_picture_start[whole.start : whole.stop + 1])[::step]
        total += int(part.sum(dtype=np.int64))
        text += int(columns.sample_text_tokens[whole].sum(dtype=np.int64)) - int(pictures.sum())
        targets += int(columns.sample_loss_tokens[whole].sum(dtype=np.int64))
        found = np.bincount(pictures)
        per_sample = _added(per_sample, found)
    frames, videos = _frames(samples, step)
    return SourceStats(
        name=source.name,
        path=str(index.path),
        kind=index.kind,
        samples=samples.num_items,
        too_long=int(np.count_nonzero(lengths > samples.seq_length)),
        left_out=samples.num_skipped,
        text_tokens=text,
        picture_tokens=total - text,
        targets=targets,
        pictures=int(per_sample @ np.arange(len(per_sample))),
        frames=frames,
        videos=videos,
        longest=int(lengths.max()),
        length_edges=edges,
        length_counts=counts,
        pictures_per_sample=per_sample,
        sizes=_sizes(samples, step, most_pictures),
    )


def row_stats(stream: RowStream, most_rows: int) -> RowStats:
    """Plan the first rows of a run and count what they hold.

    Args:
        stream: the rows.
        most_rows: how many to plan; fewer where the data end.

    Raises:
        DataError: there is no row.
    """
    count = len(stream.sources)
    cursor = stream.start()
    used, padded, tokens = [], [], []
    samples = np.zeros(count, np.int64)
    left = most_rows
    while left:
        rows, cursor = stream.take(cursor, min(left, _ROWS_AT_ONCE))
        if not rows:
            break
        left -= len(rows)
        number = np.repeat(np.arange(len(rows)), [len(row.sample) for row in rows])
        source = np.concatenate([row.source for row in rows])
        length = np.concatenate([row.length for row in rows]).astype(np.int64)
        used.append(_sum_by(number, length, len(rows)))
        padded.append(_sum_by(number, np.concatenate([row.padded for row in rows]), len(rows)))
        tokens.append(
            _sum_by(number * count + source, length, len(rows) * count).reshape(-1, count)
        )
        samples += np.bincount(source, minlength=count)
    if not used:
        raise DataError("the data give no row; raise data.train.NAME.max_epochs")
    by_row = np.concatenate(tokens)
    bounds = np.unique(np.linspace(0, len(by_row), min(PARTS, len(by_row)) + 1).astype(np.int64))
    return RowStats(
        seq_length=stream.seq_length,
        ended=not stream.take(cursor, 1)[0],
        used=np.concatenate(used),
        padded=np.concatenate(padded),
        part_rows=bounds,
        part_tokens=np.add.reduceat(by_row, bounds[:-1], axis=0),
        source_samples=samples,
    )


def rejected(index: DatasetIndex) -> int:
    """Samples and entries that the build of a set left out.

    Raises:
        DataError: the set's `dataset.json` cannot be read.
    """
    path = index.path / DATASET_FILE
    try:
        return int(json.loads(path.read_bytes())["rejected"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: tells no number of rejected samples ({error}); build the data set again"
        ) from error


def _blocks(count: int) -> Iterator[slice]:
    for first in range(0, count, _AT_ONCE):
        yield slice(first, min(first + _AT_ONCE, count))


def _sum_by(
    group: NDArray[np.int64], values: NDArray[np.integer[Any]], groups: int
) -> NDArray[np.int64]:
    # Exact: a row's tokens are far below 2**53.
    return np.bincount(group, values, groups).astype(np.int64)


def _added(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    out = longer.copy()
    out[: len(shorter)] += shorter
    return out


def _frames(samples: SampleSet, step: int) -> tuple[int, int]:
    """(frames, videos) of the samples that are drawn."""
    columns = samples.index.columns
    start = columns.sample_picture_start
    frames = videos = 0
    for block in _blocks(samples.num_items):
        bounds = start[block.start * step : block.stop * step + 1]
        low, high = int(bounds[0]), int(bounds[-1])
        if low == high:
            continue
        of = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        pts = columns.picture_pts[low:high]
        frame = (pts != STILL) & (of % step == 0)
        shard, offset = columns.picture_shard[low:high], columns.picture_offset[low:high]
        begins = frame.copy()
        # The frames of a video follow each other, in time too, and lie in the same bytes.
        begins[1:] &= (
            ~frame[:-1]
            | (of[1:] != of[:-1])
            | (pts[1:] <= pts[:-1])
            | (shard[1:] != shard[:-1])
            | (offset[1:] != offset[:-1])
        )
        frames += int(np.count_nonzero(frame))
        videos += int(np.count_nonzero(begins))
    return frames, videos


def _sizes(samples: SampleSet, step: int, most: int) -> PictureSizes:
    columns = samples.index.columns
    every = max(1, -(-samples.index.num_pictures // most))
    place = np.arange(0, samples.index.num_pictures, every)
    if step > 1:
        of = np.searchsorted(columns.sample_picture_start, place, side="right") - 1
        place = place[of % step == 0]
    height = columns.picture_height[place].astype(np.int64)
    width = columns.picture_width[place].astype(np.int64)
    return PictureSizes(height, width, samples.shapes(place).tokens, every)
