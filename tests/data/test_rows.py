"""Packed rows: packing worked out by hand, and rows that depend on nothing but their number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_vlm.data import rows
from megatron_vlm.data.rows import (
    Row,
    RowSource,
    Segment,
    count_first_fit_decreasing,
    count_in_order,
    pack_first_fit_decreasing,
    pack_in_order,
)
from megatron_vlm.errors import ConfigError, DataError
from tests.data.samples import VISION, data_config, index_of

pytestmark = pytest.mark.unit


def source_of(
    lengths: list[int], seq_length: int = 64, seed: int = 5, **changes: object
) -> RowSource:
    return RowSource(index_of(lengths), seq_length, data_config(**changes), seed, None)


def members(row: Row) -> list[int]:
    return [segment.sample for segment in row.segments]


def test_first_fit_decreasing_by_hand() -> None:
    # By length: 3(70) 0(50) 5(50) 1(40) 4(30) 2(20) into 100:
    # [3], [0], 5 joins 0, [1], 4 joins 3 (first with room), 2 joins 1.
    assert pack_first_fit_decreasing([50, 40, 20, 70, 30, 50], 100) == [[0, 5], [1, 2], [3, 4]]
    assert pack_first_fit_decreasing([10, 10, 10], 20) == [[0, 1], [2]]
    assert pack_first_fit_decreasing([], 20) == []


def test_in_order_by_hand() -> None:
    assert pack_in_order([50, 40, 20, 70, 30, 50], 100) == [[0, 1], [2, 3], [4, 5]]
    assert pack_in_order([100, 1, 99, 100], 100) == [[0], [1, 2], [3]]


def test_packing_against_a_plain_first_fit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = (rng.integers(1, 9, rng.integers(1, 60)) * 16).tolist()
        bins: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            for members_ in bins:
                if sum(lengths[j] for j in members_) + lengths[i] <= 128:
                    members_.append(i)
                    break
            else:
                bins.append([i])
        expected = sorted((sorted(found) for found in bins), key=lambda found: found[0])
        assert pack_first_fit_decreasing(lengths, 128) == expected


@pytest.mark.parametrize("longest", [3, 20, 64])
def test_counting_equals_packing(longest: int) -> None:
    rng = np.random.default_rng(longest)
    windows = rng.integers(1, longest + 1, (40, 37))
    windows[-1, 11:] = 0
    pairs = (
        (count_first_fit_decreasing, pack_first_fit_decreasing),
        (count_in_order, pack_in_order),
    )
    for count, pack in pairs:
        expected = [len(pack(w[w > 0].tolist(), 64)) for w in windows]
        assert count(windows, 64).tolist() == expected
        assert count(windows[:, :1], 64).tolist() == [1] * 40


def test_a_jump_far_ahead_packs_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []

    def spy(lengths: list[int], capacity: int) -> list[list[int]]:
        packed.append(len(lengths))
        return pack_first_fit_decreasing(lengths, capacity)

    lengths = np.random.default_rng(8).integers(1, 65, 100_000).tolist()
    monkeypatch.setattr(rows, "pack_first_fit_decreasing", spy)
    source_of(lengths).row(120_000)  # in the second epoch
    assert packed == [8]


def test_lengths_count_pictures_at_their_full_size() -> None:
    # 28x56 -> 2 tokens, 84x84 -> 9; each replaces its one placeholder.
    pictures = [[(1, 28, 56), (3, 84, 84)], [], [(0, 56, 56)]]
    index = index_of([10, 7, 5], pictures)
    source = RowSource(index, 64, data_config(), 0, VISION)
    assert source.lengths.tolist() == [10 - 2 + 2 + 9, 7, 5 - 1 + 4]
    assert source.padded_lengths.tolist() == [32, 16, 16]
    assert source.picture_tokens.tolist() == [2, 9, 4]
    assert list(zip(source.grid_h, source.grid_w, strict=True)) == [(2, 4), (6, 6), (4, 4)]
    starts, tokens = source.picture_spans(0)
    # The second placeholder moves by the one token that the first picture adds.
    assert (starts.tolist(), tokens.tolist()) == ([1, 4], [2, 9])
    assert source.picture_spans(1)[0].tolist() == []


def test_unshuffled_rows_by_hand() -> None:
    source = source_of([16, 17, 5, 64, 1, 30], shuffle=False)
    assert source.num_rows_per_epoch == 3
    assert source.row(0) == Row(
        (Segment(0, 0, 16, 16), Segment(1, 16, 17, 32), Segment(2, 48, 5, 16))
    )
    assert source.row(1) == Row((Segment(3, 0, 64, 64),))
    assert source.row(2) == Row((Segment(4, 0, 1, 16), Segment(5, 16, 30, 32)))
    assert source.row(3) == source.row(0)  # the next epoch
    assert [source.num_rows(epoch) for epoch in range(3)] == [3, 3, 3]


def test_windows_are_packed_on_their_own() -> None:
    # One window of 4 would put each short sample beside a long one.
    lengths = [48, 48, 16, 16]
    assert source_of(lengths, shuffle=False, packing_window=2).num_rows_per_epoch == 3
    shuffled = source_of(lengths, packing_window=4)
    assert [shuffled.num_rows(epoch) for epoch in range(3)] == [2, 2, 2]


def test_every_epoch_holds_every_sample_once_in_a_new_order() -> None:
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 65, 100).tolist()
    source = source_of(lengths)
    first, orders = 0, []
    for epoch in range(3):
        epoch_rows = [source.row(first + i) for i in range(source.num_rows(epoch))]
        first += len(epoch_rows)
        order = [sample for row in epoch_rows for sample in members(row)]
        assert Counter(order) == Counter(range(100))
        orders.append(order)
        for row in epoch_rows:
            place = 0
            for segment in row.segments:
                assert segment.start == place
                assert segment.length == lengths[segment.sample]
                assert segment.padded == (segment.length + 15) // 16 * 16
                place += segment.padded
            assert place <= 64
    assert orders[0] != orders[1] != orders[2]


def test_epoch_order_is_pinned() -> None:
    # Recomputed from numpy's raw Philox stream, which numpy promises never to change. If this
    # fails, runs no longer resume at their place in the data.
    source = source_of([64] * 8, seed=1234)
    order = [members(source.row(number))[0] for number in range(16)]
    for epoch in range(2):
        draws = np.random.Philox(key=[1234, epoch]).random_raw(8)
        expected = sorted(range(8), key=lambda i: draws[i])
        assert order[epoch * 8 : epoch * 8 + 8] == expected
    assert order == [7, 3, 0, 1, 4, 2, 5, 6, 0, 5, 6, 4, 2, 1, 7, 3]


def test_random_access_equals_sequential() -> None:
    lengths = np.random.default_rng(3).integers(1, 65, 300).tolist()
    forward = source_of(lengths)
    sequence = [forward.row(number) for number in range(900)]
    jumping = source_of(lengths)
    for number in np.random.default_rng(4).permutation(900).tolist():
        assert jumping.row(number) == sequence[number]
    assert source_of(lengths).row(899) == sequence[899]


def test_seed_decides_the_order() -> None:
    lengths = list(range(1, 60))
    found = [[source_of(lengths, seed=seed).row(i) for i in range(20)] for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_too_long_samples() -> None:
    with pytest.raises(DataError) as raised:
        source_of([10, 65, 70])
    message = str(raised.value)
    assert "000000001.json in shard-00000.tar) has 65 tokens" in message
    assert "training.seq_length 64" in message
    assert "2 such samples; the longest has 70" in message
    assert "data.skip_too_long=true" in message
    assert "\n" not in message
    source = source_of([10, 65, 70, 64], skip_too_long=True)
    assert source.num_skipped == 2
    samples = {sample for i in range(8) for sample in members(source.row(i))}
    assert samples == {0, 3}
    with pytest.raises(DataError, match="every sample is longer"):
        source_of([65, 66], skip_too_long=True)
    with pytest.raises(DataError, match="no samples"):
        source_of([])


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="seq_length 100 is not a multiple of data.pad_multiple"):
        source_of([10], seq_length=100)
    index = index_of([10], [[(0, 28, 28)]])
    with pytest.raises(ConfigError, match=r"model\.vision is null"):
        RowSource(index, 64, data_config(), 0, None)
    four = VISION.model_copy(update={"in_channels": 4})
    with pytest.raises(ConfigError, match=r"in_channels 4: pictures are read as RGB"):
        RowSource(index, 64, data_config(), 0, four)
    thin = index_of([10], [[(0, 1, 300)]])
    with pytest.raises(DataError, match="unwritten: picture of 1x300"):
        RowSource(thin, 64, data_config(), 0, VISION)
    with pytest.raises(ValueError, match="negative"):
        source_of([10]).row(-1)
