"""Packed rows: which samples share a row of `seq_length` tokens, for every row of a run.

Rows are made window by window: samples are drawn until they fill `packing_rows` rows, packed, and
those that found no room open the next window. A window is a pure function of its start (how many
samples of each source were drawn, and which wait) and of the configuration, so a `Cursor` of a few
integers is all that resuming needs, with any number of ranks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from hashlib import sha256
from itertools import chain, pairwise
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.mixture import Phase, next_draws
from megatron_vlm.data.packing import pack_best_fit, pack_in_order
from megatron_vlm.data.rows import Cursor, Row, Window
from megatron_vlm.data.sample_set import Pieces, SampleSet
from megatron_vlm.data.untie import UntieSettings
from megatron_vlm.errors import DataError

_KEPT_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A data set's part in a mixture."""

    name: str
    samples: SampleSet
    max_epochs: float | None = None
    """Passes over the set after which nothing more is drawn from it; null: endless."""
    untie: UntieSettings | None = None
    """How its documents share rows of their own as one segment; null: as all others."""

    @property
    def limit(self) -> int | None:
        """Items that may be drawn; null: endless."""
        if self.max_epochs is None:
            return None
        # The decimal that was written: 1.15 of 100 samples are 115.
        return int(Fraction(str(self.max_epochs)) * self.samples.num_items)


class RowStream:
    """Every row of a run, in order."""

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        *,
        seq_length: int,
        pad_multiple: int,
        packing_rows: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        """Pack nothing yet.

        Args:
            sources: what is mixed.
            phases: rates of draws, one for each source, and from which token on they hold.
            seq_length: tokens of a row.
            pad_multiple: what each sample is padded to; divides `seq_length`.
            packing_rows: rows of a window.
            shuffle: draw in a new order each epoch and pack for best fit; else keep the order.
            seed: decides the orders.
        """
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self._phases = tuple(phases)
        self._multiple = pad_multiple
        self._window_rows = packing_rows
        self._shuffle = shuffle
        self._untied = [n for n, source in enumerate(self.sources) if source.untie is not None]
        self._seed = seed
        # By name, so that adding a source leaves the orders of the others as they are.
        self._keys = [
            int.from_bytes(sha256(source.name.encode()).digest()[:8], "little")
            for source in self.sources
        ]
        self._packed: OrderedDict[Window, tuple[list[Row], Window]] = OrderedDict()
        self._lock = Lock()

    def start(self) -> Cursor:
        """The place before the first row."""
        none = (0,) * len(self.sources)
        return Cursor(Window(0, 0, 0, none, none))

    def take(self, cursor: Cursor, count: int) -> tuple[list[Row], Cursor]:
        """The next rows, and the place behind them. Safe to call from several threads.

        Returns:
            `count` rows, fewer only where every source has come to its end.
        """
        rows: list[Row] = []
        while len(rows) < count:
            packed, following = self._window(cursor.window)
            if not packed:
                break
            last = min(cursor.row + count - len(rows), len(packed))
            rows += packed[cursor.row : last]
            cursor = replace(cursor, row=last)
            if last == len(packed):
                cursor = replace(cursor, window=following, row=0)
        return rows, cursor

    def _window(self, start: Window) -> tuple[list[Row], Window]:
        """Rows of a window, and the window after it."""
        with self._lock:
            if start not in self._packed:
                self._packed[start] = self._pack(start)
                while len(self._packed) > _KEPT_WINDOWS:
                    self._packed.popitem(last=False)
            return self._packed[start]

    def _pack(self, start: Window) -> tuple[list[Row], Window]:
        wanted = self._window_rows
        while True:
            pieces, source, following, ended = self._draw(start, wanted)
            bins, left = self._bins(pieces, source, len(start.waiting), ended)
            if bins or ended:
                break
            # Untied sources hold back what does not fill a row.
            wanted += 1
        if len(pieces.length) and pieces.length.max() > self.seq_length:
            raise DataError("a sample that waits is longer than a row; the position is damaged")
        table = (source[left], pieces.sample[left], pieces.offset[left], pieces.length[left])
        waiting = tuple(zip(*(column.tolist() for column in table), strict=True))
        rows = self._lay_out(start.rows, bins, pieces, source)
        return rows, replace(following, rows=start.rows + len(rows), waiting=waiting)

    def _bins(
        self, pieces: Pieces, source: NDArray[np.int32], waiting: int, ended: bool
    ) -> tuple[list[list[int]], list[int]]:
        """Places of each row's pieces, in the order of the rows; and of those that have to wait.

        The pieces of an untied source fill rows of their own, as many as they fill to the end.
        """
        units = -(-pieces.length // self._multiple)
        capacity = self.seq_length // self._multiple
        free = None if ended else self._window_rows
        if not self._untied:
            return self._packed_bins(units.tolist(), capacity, free, waiting)
        bins: list[list[int]] = []
        left: list[int] = []
        others = np.ones(len(source), bool)
        sizes = np.full(len(source), capacity)
        groups: list[tuple[NDArray[np.int64], int | None]] = []
        for number in self._untied:
            mine = source == number
            others &= ~mine
            # One segment: nothing lies between its documents, so every token counts.
            units[mine], sizes[mine] = pieces.length[mine], self.seq_length
            most = None if free is None else min(int(units[mine].sum()) // self.seq_length, free)
            groups.append((np.flatnonzero(mine), most))
            free = None if free is None or most is None else free - most
        groups.append((np.flatnonzero(others), free))
        for places, most in groups:
            if not places.size:
                continue
            first = int(np.searchsorted(places, waiting))
            found, over = self._packed_bins(
                units[places].tolist(), int(sizes[places[0]]), most, first
            )
            bins += [places[members].tolist() for members in found]
            left += places[over].tolist()
        return sorted(bins), sorted(left)

    def _packed_bins(
        self, sizes: Sequence[int], capacity: int, most: int | None, first: int
    ) -> tuple[list[list[int]], list[int]]:
        if self._shuffle:
            return pack_best_fit(sizes, capacity, most, first)
        return pack_in_order(sizes, capacity, most)

    def _draw(self, window: Window, rows: int) -> tuple[Pieces, NDArray[np.int32], Window, bool]:
        """What a window packs: what waits, then draws until so many rows could be full.

        Returns:
            The pieces, their sources, the state behind them, and whether the sources have ended.
        """
        waiting = np.asarray(window.waiting, dtype=np.int64).reshape(-1, 4)
        sources = [waiting[:, 0].astype(np.int32)]
        found = [
            Pieces(waiting[:, 1], waiting[:, 2].astype(np.int32), waiting[:, 3].astype(np.int32))
        ]
        missing = rows * self.seq_length - self._padded(found[0].length)
        window = replace(window, waiting=())
        while missing > 0:
            source, pieces, window, progress = self._some_draws(window, missing)
            if not progress:
                break
            sources.append(source)
            found.append(pieces)
            missing -= self._padded(pieces.length)
        joined = Pieces(
            np.concatenate([pieces.sample for pieces in found]),
            np.concatenate([pieces.offset for pieces in found]),
            np.concatenate([pieces.length for pieces in found]),
        )
        return joined, np.concatenate(sources), window, missing > 0

    def _some_draws(
        self, window: Window, missing: int
    ) -> tuple[NDArray[np.int32], Pieces, Window, bool]:
        """Draw towards `missing` padded tokens, within a phase.

        Returns:
            Sources and pieces of the draws in order, the state behind them, and false if there was
            nothing left to draw.
        """
        window = self._enter_phase(window)
        rate = self._phases[window.phase].rate
        limits = [source.limit for source in self.sources]
        left = [
            None if limit is None else max(limit - drawn, 0)
            for limit, drawn in zip(limits, window.drawn, strict=True)
        ]
        done = [d - b for d, b in zip(window.drawn, window.bases, strict=True)]
        order = next_draws(rate, done, left, self._draws_for(missing, rate))
        if not order.size:
            if window.phase + 1 == len(self._phases):
                none = np.zeros(0, np.int32)
                return none, Pieces(none.astype(np.int64), none, none), window, False
            # This phase's sources have ended before its tokens were drawn: on to the next.
            return self._some_draws(self._at_phase(window, window.phase + 1), missing)
        pieces, of = self._pieces_of(order, window.drawn)

        # The window is full, or the phase ends, with the first draw that reaches the bound.
        padded = np.zeros(len(order), np.int64)
        np.add.at(padded, of, -(-pieces.length // self._multiple) * self._multiple)
        kept = int(np.searchsorted(np.cumsum(padded), missing)) + 1
        if window.phase + 1 < len(self._phases):
            tokens = np.zeros(len(order), np.int64)
            np.add.at(tokens, of, pieces.length)
            room = self._phases[window.phase + 1].from_tokens - window.tokens
            kept = min(kept, int(np.searchsorted(np.cumsum(tokens), room)) + 1)
        order = order[:kept]
        count = int(np.searchsorted(of, kept))
        pieces = Pieces(pieces.sample[:count], pieces.offset[:count], pieces.length[:count])
        counts = np.bincount(order, minlength=len(self.sources))
        window = replace(
            window,
            tokens=window.tokens + int(pieces.length.sum(dtype=np.int64)),
            drawn=tuple(int(d + c) for d, c in zip(window.drawn, counts, strict=True)),
        )
        return order[of[:count]].astype(np.int32), pieces, window, True

    def _enter_phase(self, window: Window) -> Window:
        phase = window.phase
        while (
            phase + 1 < len(self._phases) and window.tokens >= self._phases[phase + 1].from_tokens
        ):
            phase += 1
        return window if phase == window.phase else self._at_phase(window, phase)

    @staticmethod
    def _at_phase(window: Window, phase: int) -> Window:
        return replace(window, phase=phase, bases=window.drawn)

    def _draws_for(self, missing: int, rate: Sequence[float]) -> int:
        """About how many draws give so many tokens."""
        weighted = sum(
            r * source.samples.tokens / source.samples.num_items
            for r, source in zip(rate, self.sources, strict=True)
        )
        return int(missing * sum(rate) / max(weighted, 1.0)) + 16

    def _pieces_of(
        self, order: NDArray[np.int64], drawn: Sequence[int]
    ) -> tuple[Pieces, NDArray[np.int64]]:
        """Pieces of draws in their order, and the draw that each is of."""
        found: list[tuple[Pieces, NDArray[np.int64]]] = []
        for number, source in enumerate(self.sources):
            places = np.flatnonzero(order == number)
            if not places.size:
                continue
            first = drawn[number]
            items = self._items(number, np.arange(first, first + len(places)))
            pieces, of = source.samples.pieces(items)
            found.append((pieces, places[of]))
        if len(found) == 1:
            return found[0]
        of = np.concatenate([places for _, places in found])
        by_draw = np.argsort(of, kind="stable")
        joined = [
            np.concatenate([getattr(pieces, name) for pieces, _ in found])[by_draw]
            for name in ("sample", "offset", "length")
        ]
        return Pieces(*joined), of[by_draw]

    def _items(self, source: int, draws: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items that a source's draws, counted over all epochs, stand for."""
        samples = self.sources[source].samples
        epochs, places = np.divmod(draws, samples.num_items)
        if not self._shuffle:
            return places
        items = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            mine = epochs == epoch
            items[mine] = samples.order(self._seed, self._keys[source], epoch)(places[mine])
        return items

    def _padded(self, lengths: NDArray[np.int32]) -> int:
        multiple = self._multiple
        return int((-(-lengths.astype(np.int64) // multiple) * multiple).sum())

    def _lay_out(
        self, first: int, bins: list[list[int]], pieces: Pieces, source: NDArray[np.int32]
    ) -> list[Row]:
        """All rows of a window at once: their arrays are parts of a few long ones."""
        order = np.fromiter(chain.from_iterable(bins), np.int64)
        length = pieces.length[order]
        padded = -(-length // self._multiple) * self._multiple
        bounds = np.cumsum([0, *(len(members) for members in bins)]).tolist()
        untied = np.isin(source[order[bounds[:-1]]], self._untied).tolist()
        for number in np.flatnonzero(untied).tolist():
            # One segment: nothing lies between its documents.
            inside = slice(bounds[number], bounds[number + 1])
            total = int(length[inside].sum())
            padded[inside] = length[inside]
            padded[bounds[number + 1] - 1] += -total % self._multiple
        before = np.cumsum(padded, dtype=np.int64) - padded
        counts = np.diff(bounds)
        start = (before - np.repeat(before[bounds[:-1]], counts)).astype(np.int32)
        source, sample, offset = source[order], pieces.sample[order], pieces.offset[order]
        return [
            Row(
                number,
                source[low:high],
                sample[low:high],
                offset[low:high],
                start[low:high],
                length[low:high],
                padded[low:high],
                untied[number - first],
            )
            for number, (low, high) in enumerate(pairwise(bounds), first)
        ]
