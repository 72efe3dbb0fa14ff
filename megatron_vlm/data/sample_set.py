"""A data set as a run sees it: the length of every sample, and what of it may be drawn.

Lengths depend on the model, since a picture's tokens follow from the encoder's pixel bounds. They
are all that stays in memory (4 bytes a sample); everything else is read from the mapped columns
for the samples of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.geometry import grid, num_image_tokens, target_sizes
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.permutation import Permutation
from megatron_vlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_vlm.config.model_schema import VisionConfig
    from megatron_vlm.config.schema import LongSamples

_SAMPLES_AT_ONCE = 1 << 16
"""Small enough to stay in a core's cache, where the arithmetic is several times faster."""


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What is laid into rows: whole samples, and parts of those that are longer than a row."""

    sample: NDArray[np.int64]
    """[pieces] number of its sample in the data set."""
    offset: NDArray[np.int32]
    """[pieces] first of the sample's tokens that it holds; 0 but for later parts."""
    length: NDArray[np.int32]
    """[pieces] tokens, pictures at their full number."""


@dataclass(frozen=True, slots=True, eq=False)
class PictureShapes:
    """Some pictures as the encoder will see them."""

    grid_h: NDArray[np.int64]
    """Patches along the height."""
    grid_w: NDArray[np.int64]
    """Patches along the width."""
    columns: NDArray[np.int64]
    """Language tokens along the width."""
    tokens: NDArray[np.int64]
    """Language tokens."""


class SampleSet:
    """Lengths and order of a data set's samples under a model."""

    def __init__(
        self,
        index: DatasetIndex,
        seq_length: int,
        vision: VisionConfig | None,
        long_samples: LongSamples = "refuse",
    ) -> None:
        """Compute every sample's length, in one pass.

        Args:
            index: the data set.
            seq_length: tokens of a row.
            vision: sizes pictures; null for a text-only model.
            long_samples: what becomes of samples longer than a row.

        Raises:
            ConfigError: the model cannot see the set's pictures, or sizes them otherwise than the
                set's coordinates were written for.
            DataError: the set is empty, nothing of it fits, or a sample is too long.
        """
        self.index = index
        self.seq_length = seq_length
        self.vision = vision
        _check_model(index, vision)
        if not index.num_samples:
            raise DataError(f"{index.path}: the data set has no samples; build it again")
        self.lengths = self._lengths()
        # Of a preference set, the chosen answers, which come first in each pair.
        self._step = 2 if index.kind == "preference" else 1
        self.num_items = index.num_samples // self._step
        """Samples of an epoch, those that are left out included."""
        self._split = long_samples == "split"
        self.num_skipped, self.tokens = self._choose(long_samples)

    def order(self, *key: int) -> Permutation:
        """A pseudo-random order of the items of an epoch."""
        return Permutation(self.num_items, *key)

    def pieces(self, items: NDArray[np.int64]) -> tuple[Pieces, NDArray[np.int64]]:
        """What items are laid into rows as, in their order.

        Args:
            items: [n], each from 0 to below `num_items`.

        Returns:
            The pieces, and int64 [pieces] the place in `items` that each is of. A sample that is
            left out has none; one longer than a row may have several.
        """
        samples = items * self._step
        lengths = self.lengths[samples]
        of = np.flatnonzero(lengths <= self.seq_length)
        whole = Pieces(samples[of], np.zeros(len(of), np.int32), lengths[of])
        if len(of) == len(items) or not self._split:
            return whole, of
        found = [(whole, of)]
        for place in np.flatnonzero(lengths > self.seq_length).tolist():
            bounds = self._cut(int(samples[place]))
            count = len(bounds) - 1
            found.append(
                (
                    Pieces(np.full(count, samples[place]), bounds[:-1], np.diff(bounds)),
                    np.full(count, place),
                )
            )
        of = np.concatenate([places for _, places in found])
        order = np.argsort(of, kind="stable")
        joined = [
            np.concatenate([getattr(pieces, name) for pieces, _ in found])[order]
            for name in ("sample", "offset", "length")
        ]
        return Pieces(*joined), of[order]

    def loss_tokens(self, pieces: Pieces) -> NDArray[np.int64]:
        """[pieces] target tokens of each."""
        found = self.index.columns.sample_loss_tokens[pieces.sample].astype(np.int64)
        for place in np.flatnonzero(pieces.length != self.lengths[pieces.sample]).tolist():
            offset, length = int(pieces.offset[place]), int(pieces.length[place])
            starts, tokens = self.picture_spans(int(pieces.sample[place]))
            inside = (starts >= offset) & (starts < offset + length)
            # Nothing of the row precedes its first token, so nothing predicts it.
            first_is_text = not bool(np.any(starts == offset))
            found[place] = length - int(tokens[inside].sum()) - first_is_text
        return found

    def shapes(self, pictures: NDArray[np.int64]) -> PictureShapes:
        """Sizes of pictures, by their places in the index."""
        columns = self.index.columns
        return self._shapes(
            columns.picture_height[pictures],
            columns.picture_width[pictures],
            columns.picture_max_tokens[pictures],
        )

    def picture_spans(self, sample: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, tokens) of a sample's pictures: place and number of their language tokens.

        `starts` count from the sample's first token, with every picture at its full number.
        """
        pictures = self.index.picture_range(sample)
        place = np.arange(pictures.start, pictures.stop)
        tokens = self.shapes(place).tokens
        starts = self.index.columns.picture_position[place].astype(np.int64)
        # Each earlier picture has grown from one placeholder.
        starts[1:] += np.cumsum(tokens - 1)[:-1]
        return starts, tokens

    def _shapes(
        self, heights: NDArray[np.int32], widths: NDArray[np.int32], caps: NDArray[np.int32]
    ) -> PictureShapes:
        if self.vision is None:
            none = np.zeros(0, np.int64)
            return PictureShapes(none, none, none, none)
        try:
            sizes = target_sizes(heights, widths, self.vision, caps)
        except DataError as error:
            raise DataError(f"{self.index.path}: {error}") from error
        grid_h, grid_w = grid(*sizes, self.vision)
        columns = grid_w // self.vision.spatial_merge_size
        return PictureShapes(grid_h, grid_w, columns, num_image_tokens(grid_h, grid_w, self.vision))

    def _lengths(self) -> NDArray[np.int32]:
        columns, count = self.index.columns, self.index.num_samples
        lengths = np.empty(count, np.int32)
        for first in range(0, count, _SAMPLES_AT_ONCE):
            last = min(first + _SAMPLES_AT_ONCE, count)
            text = columns.sample_text_tokens[first:last].astype(np.int64)
            bounds = columns.sample_picture_start[first : last + 1]
            low, high = int(bounds[0]), int(bounds[-1])
            if low < high:
                tokens = self._shapes(
                    columns.picture_height[low:high],
                    columns.picture_width[low:high],
                    columns.picture_max_tokens[low:high],
                ).tokens
                grown = np.concatenate(([0], np.cumsum(tokens - 1)))
                text += grown[bounds[1:] - low] - grown[bounds[:-1] - low]
            # Longer than any row can be; nothing more of its length matters.
            lengths[first:last] = np.minimum(text, np.iinfo(np.int32).max)
        return lengths

    def _choose(self, long_samples: LongSamples) -> tuple[int, int]:
        """Samples that are left out, and tokens of an epoch without them."""
        lengths = self.lengths[:: self._step]
        too_long = np.flatnonzero(lengths > self.seq_length)
        if too_long.size and long_samples == "refuse":
            sample = int(too_long[0]) * self._step
            first, last = self.index.columns.sample_picture_start[sample : sample + 2]
            smaller = "lower model.vision.max_pixels, " if last > first else ""
            raise DataError(
                f"{self.index.describe(sample)} has {self.lengths[sample]} tokens, more than "
                f"training.seq_length {self.seq_length} ({too_long.size} such samples; the "
                f"longest has {lengths.max()}); raise training.seq_length, {smaller}or set "
                "data.long_samples to skip or split"
            )
        fits = lengths <= self.seq_length
        tokens = int(lengths[fits].sum(dtype=np.int64))
        skipped = 0
        for item in too_long.tolist() if long_samples == "split" else ():
            bounds = self._cut(item * self._step)
            skipped += len(bounds) == 1
            tokens += int(bounds[-1])
        if long_samples == "skip":
            skipped = len(too_long)
        if not tokens:
            raise DataError(
                f"{self.index.path}: every sample is longer than training.seq_length "
                f"{self.seq_length}; the shortest has {lengths.min()} tokens: raise it, in "
                "`mvlm data` --seq-length, or set data.long_samples to split"
            )
        return skipped, tokens

    def _cut(self, sample: int) -> NDArray[np.int32]:
        """Bounds of the parts of a sample that is longer than a row; [0] if it cannot be cut.

        Parts are as long as a row, or end before a picture that would lie across the row's end.
        Only what is learned throughout is cut: the answer to a conversation means nothing without
        its question, and only there are the target tokens of a part known without reading it.
        """
        columns = self.index.columns
        starts, tokens = self.picture_spans(sample)
        total = int(columns.sample_text_tokens[sample]) + int((tokens - 1).sum())
        first_is_text = not bool(np.any(starts == 0))
        learned = total - int(tokens.sum()) - first_is_text
        if int(columns.sample_loss_tokens[sample]) != learned or np.any(tokens > self.seq_length):
            return np.zeros(1, np.int32)
        bounds = [0]
        while total - bounds[-1] > self.seq_length:
            end = bounds[-1] + self.seq_length
            across = np.flatnonzero((starts < end) & (starts + tokens > end))
            bounds.append(int(starts[across[0]]) if across.size else end)
        return np.asarray([*bounds, total], np.int32)


def _check_model(index: DatasetIndex, vision: VisionConfig | None) -> None:
    if not index.num_pictures:
        return
    if vision is None:
        raise ConfigError(
            f"{index.path} has {index.num_pictures} pictures, but model.vision is null; "
            "choose a model with a vision tower or a text-only data set"
        )
    if vision.in_channels != 3:
        raise ConfigError(
            f"model.vision.in_channels {vision.in_channels}: pictures are read as RGB; set it to 3"
        )
    unit = vision.patch_size * vision.spatial_merge_size
    seen = {"min_pixels": vision.min_pixels, "max_pixels": vision.max_pixels, "unit": unit}
    for name, value in seen.items():
        written = index.coordinates.get(name, value)
        if written != value:
            raise ConfigError(
                f"{index.path}: its absolute coordinates are of pictures sized with {name} "
                f"{written}, but this model has {value}; build it for this model, or with relative "
                "coordinates"
            )
