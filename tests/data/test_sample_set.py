"""Lengths under a model, and what of a set can be laid into rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_vlm.data import sample_set
from megatron_vlm.data.sample_set import Pieces, SampleSet
from megatron_vlm.errors import ConfigError, DataError
from tests.data.samples import VISION, index_of

pytestmark = pytest.mark.unit


def facts(pieces: Pieces) -> list[tuple[int, int, int]]:
    columns = (pieces.sample.tolist(), pieces.offset.tolist(), pieces.length.tolist())
    return list(zip(*columns, strict=True))


def all_pieces(samples: SampleSet) -> tuple[list[tuple[int, int, int]], list[int]]:
    pieces, of = samples.pieces(np.arange(samples.num_items))
    return facts(pieces), of.tolist()


def test_lengths_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [[(2, 28, 56), (5, 56, 56)], [], [(0, 84, 84)]]
    index = index_of([12, 20, 30], pictures)
    assert SampleSet(index, 64, VISION).lengths.tolist() == [12 - 2 + 2 + 4, 20, 30 - 1 + 9]
    capped = index_of([12, 20, 30], pictures, max_tokens=4)
    # 84 x 84 may have 4 tokens at most: 56 x 56.
    assert SampleSet(capped, 64, VISION).lengths.tolist() == [12 - 2 + 2 + 4, 20, 30 - 1 + 4]
    # The pass goes through the samples a few at a time.
    monkeypatch.setattr(sample_set, "_SAMPLES_AT_ONCE", 2)
    assert SampleSet(index, 64, VISION).lengths.tolist() == [16, 20, 38]
    starts, tokens = SampleSet(index, 64, VISION).picture_spans(0)
    assert (starts.tolist(), tokens.tolist()) == ([2, 6], [2, 4])


def test_long_samples_are_refused_skipped_or_cut() -> None:
    index = index_of([10, 65, 70, 64])
    with pytest.raises(DataError) as caught:
        SampleSet(index, 64, None)
    for word in ("(entry 1,", "65 tokens", "2 such samples", "longest has 70", "data.long_samples"):
        assert word in str(caught.value)
    assert "max_pixels" not in str(caught.value)
    with pytest.raises(DataError, match=r"lower model\.vision\.max_pixels"):
        SampleSet(index_of([70], [[(60, 84, 84)]]), 64, VISION)
    samples = SampleSet(index, 64, None, "skip")
    assert (samples.num_skipped, samples.tokens, samples.num_items) == (2, 74, 4)
    assert all_pieces(samples) == ([(0, 0, 10), (3, 0, 64)], [0, 3])
    with pytest.raises(DataError, match="every sample is longer"):
        SampleSet(index_of([65, 66]), 64, None, "skip")
    with pytest.raises(DataError, match="no samples"):
        SampleSet(index_of([]), 64, None)


def test_only_what_is_learned_throughout_is_cut() -> None:
    # Everything but the first token of the first two is learned; the third is a conversation.
    index = index_of([150, 20, 150], loss_tokens=[149, 19, 30])
    samples = SampleSet(index, 64, None, "split")
    assert all_pieces(samples) == (
        [(0, 0, 64), (0, 64, 64), (0, 128, 22), (1, 0, 20)],
        [0, 0, 0, 1],
    )
    assert (samples.num_skipped, samples.tokens) == (1, 170)
    pieces, _ = samples.pieces(np.arange(3))
    # The first token of each row has nothing before it.
    assert samples.loss_tokens(pieces).tolist() == [63, 63, 21, 19]


def test_a_cut_goes_before_a_picture_that_would_lie_across() -> None:
    # 9 tokens a picture. Text 0..59, picture 60..68, text 69..99, picture 100..108, text 109..
    pictures = [[(60, 84, 84), (92, 84, 84)]]
    index = index_of([120], pictures, loss_tokens=[117])
    samples = SampleSet(index, 64, VISION, "split")
    found, _ = all_pieces(samples)
    assert found == [(0, 0, 60), (0, 60, 64), (0, 124, 12)]
    pieces, _ = samples.pieces(np.arange(1))
    # The second begins with a picture, whose last token predicts text: nothing is lost there.
    assert samples.loss_tokens(pieces).tolist() == [59, 64 - 18, 11]
    with pytest.raises(DataError, match="every sample is longer"):
        SampleSet(index, 8, VISION, "split")


def test_a_preference_set_stands_for_its_chosen_answers() -> None:
    samples = SampleSet(index_of([10, 20, 30, 90], kind="preference"), 64, None)
    assert (samples.num_items, samples.tokens) == (2, 40)
    assert all_pieces(samples)[0] == [(0, 0, 10), (2, 0, 30)]


def test_a_model_that_cannot_see_them() -> None:
    index = index_of([5], [[(0, 28, 28)]])
    with pytest.raises(ConfigError, match=r"model\.vision is null"):
        SampleSet(index, 64, None)
    with pytest.raises(ConfigError, match="in_channels 1"):
        SampleSet(index, 64, VISION.model_copy(update={"in_channels": 1}))
    written = {"convention": "absolute", "min_pixels": 784, "max_pixels": 1000, "unit": 28}
    absolute = dataclasses.replace(index, coordinates=written)
    with pytest.raises(ConfigError, match=r"max_pixels 1000, but this model has 50176"):
        SampleSet(absolute, 64, VISION)
    written["max_pixels"] = 50176
    SampleSet(absolute, 64, VISION)


def test_against_a_plain_count() -> None:
    rng = np.random.default_rng(1)
    text = rng.integers(3, 200, 300)
    pictures = []
    for length in text.tolist():
        count = int(rng.integers(0, 3))
        places = np.sort(rng.choice(length, count, replace=False)).tolist()
        pictures.append([(p, *rng.integers(28, 150, 2).tolist()) for p in places])
    loss = [
        length - len(own) - (not own or own[0][0] != 0)
        for length, own in zip(text.tolist(), pictures, strict=True)
    ]
    samples = SampleSet(index_of(text.tolist(), pictures, loss_tokens=loss), 64, VISION, "split")
    pieces, of = samples.pieces(np.arange(300))
    found: dict[int, list[tuple[int, int]]] = {}
    targets = samples.loss_tokens(pieces).tolist()
    for (sample, offset, length), place, count in zip(
        facts(pieces), of.tolist(), targets, strict=True
    ):
        assert sample == place
        found.setdefault(sample, []).append((offset, length))
        # Token by token: 1 for a token of a picture.
        line = [0] * int(samples.lengths[sample])
        starts, sizes = samples.picture_spans(sample)
        for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
            line[start : start + size] = [1] * size
            assert not (offset > start and offset < start + size)
        assert count == length - sum(line[offset : offset + length]) - (line[offset] == 0)
        assert length <= 64
    for sample, parts in found.items():
        ends = [0, *np.cumsum([length for _, length in parts]).tolist()]
        assert [offset for offset, _ in parts] == ends[:-1]
        assert ends[-1] == samples.lengths[sample]
