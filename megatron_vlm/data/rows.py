"""Packed rows: which samples share a row of `seq_length` tokens, for every row of an endless run.

Row i is a function of the index, the configuration, the seed and i alone. Nothing is drawn as the
run goes on, so the number of rows consumed is all the state that resuming needs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.geometry import grid, num_image_tokens, target_sizes
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_vlm.config.schema import DataConfig, VisionConfig

_KEPT_WINDOWS = 64
_COUNTED_SAMPLES = 1 << 18


@dataclass(frozen=True, slots=True)
class Segment:
    """One sample's place in a row, in tokens."""

    sample: int
    """Number of the sample in its data set."""
    start: int
    """First token within the row."""
    length: int
    """Real tokens, pictures at their full number."""
    padded: int
    """Tokens up to the next segment: `length` rounded up to `pad_multiple`."""


@dataclass(frozen=True, slots=True)
class Row:
    """The samples of one row, in order; what they leave free at the end is filler."""

    segments: tuple[Segment, ...]


class RowSource:
    """Every row of a data set, epoch after epoch, by number."""

    def __init__(
        self,
        index: DatasetIndex,
        training_seq_length: int,
        data_config: DataConfig,
        seed: int,
        vision: VisionConfig | None,
    ) -> None:
        """Compute every sample's length; pack nothing yet.

        Args:
            index: the data set.
            training_seq_length: tokens of a row.
            data_config: pad_multiple, packing_window, shuffle, skip_too_long.
            seed: decides each epoch's order.
            vision: sizes pictures; null for a text-only model.

        Raises:
            ConfigError: the row is not a multiple of pad_multiple, or the model cannot see.
            DataError: the set is empty, or a sample is longer than a row.
        """
        if training_seq_length % data_config.pad_multiple:
            raise ConfigError(
                f"training.seq_length {training_seq_length} is not a multiple of "
                f"data.pad_multiple {data_config.pad_multiple}; change one of them"
            )
        self.index = index
        self.seq_length = training_seq_length
        self._window = data_config.packing_window
        self._shuffle = data_config.shuffle
        self._seed = seed
        self.grid_h, self.grid_w, self.picture_tokens = _picture_shapes(index, vision)
        self.lengths = _sample_lengths(index, self.picture_tokens)
        multiple = data_config.pad_multiple
        self.padded_lengths: NDArray[np.int64] = -(-self.lengths // multiple) * multiple
        self._eligible = self._choose(data_config.skip_too_long)
        self._windows_per_epoch = -(-len(self._eligible) // self._window)
        self._row_ends: list[int] = []
        self._packed: OrderedDict[int, list[Row]] = OrderedDict()
        self._orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = Lock()

    @property
    def num_skipped(self) -> int:
        """Samples left out because they are longer than a row (`skip_too_long`)."""
        return self.index.num_samples - len(self._eligible)

    @property
    def num_rows_per_epoch(self) -> int:
        """Rows of the first epoch. Shuffled epochs pack into slightly differing numbers of rows."""
        return self.num_rows(0)

    def num_rows(self, epoch: int) -> int:
        """Rows of an epoch, counted from 0."""
        with self._lock:
            last = (epoch + 1) * self._windows_per_epoch
            while len(self._row_ends) < last:
                self._count_windows()
            before = self._row_ends[epoch * self._windows_per_epoch - 1] if epoch else 0
            return self._row_ends[last - 1] - before

    def row(self, number: int) -> Row:
        """Row `number` of the endless run, counted from 0. Safe to call from several threads.

        Only the window that holds the row is packed. For those before it the number of rows is
        counted, once, in bulk: seconds for a hundred million samples.
        """
        if number < 0:
            raise ValueError(f"row number {number} is negative")
        with self._lock:
            window = self._find(number)
            first = self._row_ends[window - 1] if window else 0
            return self._pack(window)[number - first]

    def picture_spans(self, sample: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, tokens) of the sample's pictures: place and number of their language tokens.

        `starts` count from the sample's first token, with every picture at its full number.
        """
        pictures = self.index.picture_range(sample)
        tokens = self.picture_tokens[pictures.start : pictures.stop]
        starts = self.index.columns.picture_position[pictures.start : pictures.stop].astype(
            np.int64
        )
        # Each earlier picture has grown from one placeholder.
        starts[1:] += np.cumsum(tokens - 1)[:-1]
        return starts, tokens

    def _choose(self, skip_too_long: bool) -> NDArray[np.int64]:
        if not self.index.num_samples:
            raise DataError(f"{self.index.path}: the data set has no samples; build it again")
        too_long = np.flatnonzero(self.lengths > self.seq_length)
        if too_long.size and not skip_too_long:
            sample = int(too_long[0])
            raise DataError(
                f"{self.index.describe(sample)} has {self.lengths[sample]} tokens, more than "
                f"training.seq_length {self.seq_length} ({too_long.size} such samples; the "
                f"longest has {self.lengths.max()}); raise training.seq_length, lower "
                "model.vision.max_pixels, or set data.skip_too_long=true"
            )
        eligible = np.flatnonzero(self.lengths <= self.seq_length)
        if not eligible.size:
            raise DataError(
                f"{self.index.path}: every sample is longer than training.seq_length "
                f"{self.seq_length}; the shortest has {self.lengths.min()} tokens"
            )
        return eligible

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self._shuffle:
            return self._eligible
        if epoch not in self._orders:
            # numpy promises the raw stream of a bit generator across its versions, and does not
            # promise that of `permutation`: a run must resume alike after an upgrade.
            philox = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64))
            draws = philox.random_raw(len(self._eligible))
            self._orders[epoch] = self._eligible[np.argsort(draws, kind="stable")]
            while len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _pack(self, window: int) -> list[Row]:
        """Rows of a window, counted over all epochs; the latest windows are remembered."""
        if window in self._packed:
            self._packed.move_to_end(window)
            return self._packed[window]
        epoch, place = divmod(window, self._windows_per_epoch)
        samples = self._order(epoch)[place * self._window : (place + 1) * self._window]
        padded = self.padded_lengths[samples].tolist()
        packer = pack_first_fit_decreasing if self._shuffle else pack_in_order
        rows = [
            self._lay_out([int(samples[member]) for member in members])
            for members in packer(padded, self.seq_length)
        ]
        self._packed[window] = rows
        while len(self._packed) > _KEPT_WINDOWS:
            self._packed.popitem(last=False)
        return rows

    def _lay_out(self, samples: list[int]) -> Row:
        segments, start = [], 0
        for sample in samples:
            padded = int(self.padded_lengths[sample])
            segments.append(Segment(sample, start, int(self.lengths[sample]), padded))
            start += padded
        return Row(tuple(segments))

    def _count_windows(self) -> None:
        """Count the rows of the next windows, of one epoch."""
        epoch, place = divmod(len(self._row_ends), self._windows_per_epoch)
        first = place * self._window
        windows_at_once = max(1, _COUNTED_SAMPLES // self._window)
        samples = self._order(epoch)[first : first + windows_at_once * self._window]
        lengths = self.padded_lengths[samples]
        # A sample of no tokens fits wherever there is a row, so it fills up the last window.
        windows = np.pad(lengths, (0, -len(lengths) % self._window)).reshape(-1, self._window)
        count = count_first_fit_decreasing if self._shuffle else count_in_order
        before = self._row_ends[-1] if self._row_ends else 0
        self._row_ends += (before + np.cumsum(count(windows, self.seq_length))).tolist()

    def _find(self, number: int) -> int:
        while not self._row_ends or self._row_ends[-1] <= number:
            self._count_windows()
        return bisect_right(self._row_ends, number)


def pack_first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of positions in `lengths`: longest first, each into the first bin with room.

    Equal lengths keep their order. Within a bin positions ascend, and bins are in order of their
    first position, so that packing disturbs the drawn order as little as it can.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    shortest = min(lengths, default=0)
    first_open = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[position]
        while first_open < len(room) and room[first_open] < shortest:
            first_open += 1
        for number in range(first_open, len(room)):
            if room[number] >= length:
                bins[number].append(position)
                room[number] -= length
                break
        else:
            bins.append([position])
            room.append(capacity - length)
    return sorted(sorted(members) for members in bins)


def pack_in_order(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of positions in `lengths`, in order: a bin is closed by the first that has no room."""
    bins: list[list[int]] = []
    room = 0
    for position, length in enumerate(lengths):
        if not bins or length > room:
            bins.append([])
            room = capacity
        bins[-1].append(position)
        room -= length
    return bins


def count_first_fit_decreasing(windows: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Bins of each window as `pack_first_fit_decreasing` would fill them, all windows at once.

    Args:
        windows: [windows, n] lengths, at least one above 0 in each; a length of 0 needs no bin.
        capacity: of a bin; no length exceeds it.

    Returns:
        [windows].
    """
    lengths = -np.sort(-windows.astype(np.int32), axis=1)
    rows = np.arange(len(lengths))
    counts = np.zeros(len(lengths), dtype=np.int64)
    # Bins that are not begun have all their room, so the first fit opens the next by itself.
    room = np.full(lengths.shape, capacity, dtype=np.int32)
    opened = 0
    for column in lengths.T:
        chosen = (room[:, : opened + 1] >= column[:, None]).argmax(axis=1)
        room[rows, chosen] -= column
        np.maximum(counts, chosen + 1, out=counts)
        opened = min(int(counts.max()), lengths.shape[1] - 1)
    return counts


def count_in_order(windows: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Bins of each window as `pack_in_order` would fill them; as `count_first_fit_decreasing`."""
    counts = np.zeros(len(windows), dtype=np.int64)
    room = np.zeros(len(windows), dtype=np.int64)
    for column in windows.T:
        new = column > room
        counts += new
        room = np.where(new, capacity, room) - column
    return counts


def _picture_shapes(
    index: DatasetIndex, vision: VisionConfig | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(grid_h, grid_w, language tokens) of every picture."""
    if vision is None:
        if index.num_pictures:
            raise ConfigError(
                f"{index.path} has {index.num_pictures} pictures, but model.vision is null; "
                "choose a model with a vision tower or a text-only data set"
            )
        none = np.zeros(0, dtype=np.int64)
        return none, none, none
    if vision.in_channels != 3:
        raise ConfigError(
            f"model.vision.in_channels {vision.in_channels}: pictures are read as RGB; set it to 3"
        )
    try:
        sizes = target_sizes(index.columns.picture_height, index.columns.picture_width, vision)
    except DataError as error:
        raise DataError(f"{index.path}: {error}") from error
    grid_h, grid_w = grid(*sizes, vision)
    return grid_h, grid_w, num_image_tokens(grid_h, grid_w, vision)


def _sample_lengths(index: DatasetIndex, picture_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[samples] tokens of each sample with its pictures at their full number."""
    grown = np.concatenate(([0], np.cumsum(picture_tokens - 1)))
    start = index.columns.sample_picture_start
    lengths: NDArray[np.int64] = grown[start[1:]] - grown[start[:-1]]
    lengths += index.columns.sample_text_tokens
    return lengths
