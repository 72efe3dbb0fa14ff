"""What some rows hold, as flat tables: samples, segments, pictures, target tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.rows import Row
from megatron_vlm.data.sample_set import Pieces, SampleSet
from megatron_vlm.data.stream import RowStream
from megatron_vlm.data.untie import Layout, layout_row


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Pictures of some rows, by row, then by place in the row; all int64 [pictures]."""

    row: NDArray[np.int64]
    document: NDArray[np.int64]
    source: NDArray[np.int64]
    sample: NDArray[np.int64]
    ordinal: NDArray[np.int64]
    start: NDArray[np.int64]
    """First token within the row."""
    grid_h: NDArray[np.int64]
    grid_w: NDArray[np.int64]
    columns: NDArray[np.int64]
    """Language tokens along the width."""
    tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """All samples of some rows, in order; each int64 [samples] but for the bounds."""

    bounds: NDArray[np.int64]
    """[rows + 1] samples of each row."""
    row: NDArray[np.int64]
    unit: NDArray[np.int64]
    """The segment that each belongs to: its own, or its untied row's."""
    source: NDArray[np.int64]
    sample: NDArray[np.int64]
    offset: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    padded: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Table:
        counts = [len(row.sample) for row in rows]
        unit = np.arange(sum(counts))
        if any(row.untied for row in rows):
            begins = np.concatenate(
                [np.arange(count) == 0 if row.untied else np.ones(count, bool)
                 for row, count in zip(rows, counts, strict=True)]
            )  # fmt: skip
            unit = np.cumsum(begins) - 1
        columns = [
            np.concatenate([getattr(row, name) for row in rows]).astype(np.int64)
            for name in ("source", "sample", "offset", "start", "length", "padded")
        ]
        return cls(np.cumsum([0, *counts]), np.repeat(np.arange(len(rows)), counts), unit, *columns)

    @property
    def units(self) -> int:
        """Segments, filler left out."""
        return int(self.unit[-1]) + 1 if len(self.unit) else 0

    def by_unit(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """[units] sums over the samples of each."""
        return np.asarray(np.bincount(self.unit, values, self.units), np.int64)

    def row_of_unit(self) -> NDArray[np.int64]:
        """[units] the row of each."""
        return self.row[np.searchsorted(self.unit, np.arange(self.units))]

    def attention_costs(self) -> NDArray[np.float64]:
        """[rows] what each row's attention costs, relative."""
        squares = np.square(self.by_unit(self.padded), dtype=np.float64)
        rows = len(self.bounds) - 1
        return np.asarray(np.bincount(self.row_of_unit(), squares, rows), np.float64)

    def by_source(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Places of each source's samples."""
        return [(int(n), np.flatnonzero(self.source == n)) for n in np.unique(self.source)]


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """All segments of some rows: their samples (an untied row's as one), and each unused tail."""

    bounds: list[int]
    """[rows + 1] segments of each row."""
    padded: NDArray[np.int32]
    lengths: NDArray[np.int32]
    documents: NDArray[np.int32]

    @classmethod
    def of(cls, table: Table, seq_length: int) -> Segments:
        rows = len(table.bounds) - 1
        used = np.bincount(table.row, table.padded, minlength=rows).astype(np.int64)
        counts = np.bincount(table.row_of_unit(), minlength=rows)
        short = np.flatnonzero(used < seq_length)
        at = np.cumsum(counts)[short]
        counts[short] += 1
        return cls(
            np.cumsum([0, *counts]).tolist(),
            np.insert(table.by_unit(table.padded), at, seq_length - used[short]).astype(np.int32),
            np.insert(table.by_unit(table.length), at, 0).astype(np.int32),
            np.insert(np.arange(table.units), at, -1).astype(np.int32),
        )

    def of_rows(
        self, numbers: Sequence[int]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """(padded, lengths, documents) of some rows' segments, by the rows' numbers."""
        parts = [slice(self.bounds[number], self.bounds[number + 1]) for number in numbers]
        padded, lengths, documents = (
            column[parts[0]] if len(parts) == 1 else np.concatenate([column[p] for p in parts])
            for column in (self.padded, self.lengths, self.documents)
        )
        return padded, lengths, documents


def find_pictures(stream: RowStream, table: Table) -> Pictures:
    """The pictures of some rows; of a part of a long sample, those that lie in it."""
    row, sample, offset = table.row, table.sample, table.offset
    length, start = table.length, table.start
    parts = []
    for number, mine in table.by_source():
        samples: SampleSet = stream.sources[number].samples
        columns = samples.index.columns
        first = columns.sample_picture_start[sample[mine]]
        counts = columns.sample_picture_start[sample[mine] + 1] - first
        document = np.repeat(mine, counts)
        if not document.size:
            continue
        runs = np.cumsum(counts) - counts
        ordinal = np.arange(len(document)) - np.repeat(runs, counts)
        place = np.repeat(first, counts) + ordinal
        shapes = samples.shapes(place)
        # Within its sample, each picture comes after those before it have grown from a placeholder.
        grown = np.cumsum(shapes.tokens - 1) - (shapes.tokens - 1)
        grown -= np.repeat(grown[np.minimum(runs, len(grown) - 1)], counts)
        inside = columns.picture_position[place] + grown - offset[document]
        kept = np.flatnonzero((inside >= 0) & (inside < length[document]))
        parts.append(
            (
                row[document][kept],
                table.unit[document[kept]],
                np.full(len(kept), number),
                sample[document][kept],
                ordinal[kept],
                (start[document] + inside)[kept],
                shapes.grid_h[kept],
                shapes.grid_w[kept],
                shapes.columns[kept],
                shapes.tokens[kept],
            )
        )
    if not parts:
        return Pictures(*(np.zeros(0, np.int64) for _ in range(10)))
    columns_of = [np.concatenate([part[i] for part in parts]) for i in range(10)]
    order = np.lexsort((columns_of[4], columns_of[1]))
    return Pictures(*(column[order] for column in columns_of))


def count_loss_tokens(stream: RowStream, rows: Sequence[Row], table: Table) -> NDArray[np.int64]:
    """[units] target tokens of each, from metadata alone."""
    found = np.zeros(len(table.sample), np.int64)
    for number, mine in table.by_source():
        pieces = Pieces(
            table.sample[mine],
            table.offset[mine].astype(np.int32),
            table.length[mine].astype(np.int32),
        )
        found[mine] = stream.sources[number].samples.loss_tokens(pieces)
    found = table.by_unit(found)
    for number, row in enumerate(rows):
        if row.untied:
            unit = table.unit[table.bounds[number]]
            found[unit] = untied_layout(stream, row).num_targets
    return found


def untied_layout(stream: RowStream, row: Row) -> Layout:
    """How the samples of an untied row are cut and shuffled."""
    settings = stream.sources[int(row.source[0])].untie
    assert settings is not None
    return layout_row(settings, row.number, row.length.tolist())
