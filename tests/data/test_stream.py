"""Rows: every sample once an epoch, full rows, and the same rows from any place on."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from megatron_vlm.data.mixture import Phase
from megatron_vlm.data.rows import Cursor, Row
from megatron_vlm.data.stream import RowStream
from tests.data.samples import index_of, row_facts, rows_of, stream_of

pytestmark = pytest.mark.unit


def held(rows: list[Row], source: int = 0) -> list[int]:
    """Samples of a source in the order of the rows."""
    return [
        sample
        for row in rows
        for number, sample in zip(row.source.tolist(), row.sample.tolist(), strict=True)
        if number == source
    ]


def all_rows(stream: RowStream) -> list[Row]:
    """Every row of a stream that ends."""
    rows, _ = stream.take(stream.start(), 1 << 20)
    return rows


def mixed_stream(**changes: object) -> RowStream:
    rng = np.random.default_rng(0)
    sets = [index_of(rng.integers(3, 64, count).tolist()) for count in (90, 41, 7)]
    return stream_of(*sets, **changes)  # type: ignore[arg-type]


def test_rows_by_hand() -> None:
    # Padded to 16: 16, 32, 48, 32, 16 into rows of 64, in order, one epoch after the other.
    stream = stream_of(index_of([16, 20, 38, 20, 16]), shuffle=False, packing_rows=2)
    rows = rows_of(stream, 4)
    assert [(row.number, row.sample.tolist()) for row in rows] == [
        (0, [0, 1]),
        (1, [2]),
        (2, [3, 4, 0]),
        (3, [1]),
    ]
    assert row_facts(rows[2])[3:] == ([0, 0, 0], [0, 32, 48], [20, 16, 16], [32, 16, 16])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("packing_rows", [1, 3, 50])
def test_every_sample_stands_once_in_every_epoch(shuffle: bool, packing_rows: int) -> None:
    stream = mixed_stream(shuffle=shuffle, packing_rows=packing_rows, max_epochs=[3.0] * 3)
    rows = all_rows(stream)
    for source, count in enumerate((90, 41, 7)):
        assert Counter(held(rows, source)) == dict.fromkeys(range(count), 3)
    assert [row.number for row in rows] == list(range(len(rows)))
    for row in rows:
        assert row.padded.sum() <= 64
        assert np.array_equal(row.start, np.cumsum(row.padded) - row.padded)
        assert np.all((row.padded % 16 == 0) & (row.padded >= row.length))
        assert np.all(row.padded - row.length < 16)
        assert not row.offset.any()


def test_epochs_are_not_alike_and_a_sample_waits_for_one_row_only() -> None:
    index = index_of([32] * 40)
    rows = all_rows(stream_of(index, max_epochs=[2.0]))
    first, second = held(rows)[:40], held(rows)[40:]
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert held(all_rows(stream_of(index, max_epochs=[2.0], shuffle=False))) == 2 * list(range(40))
    assert held(all_rows(stream_of(index, max_epochs=[2.0], seed=6)))[:40] != first


def test_a_set_keeps_its_order_when_another_joins() -> None:
    one, other = index_of([64] * 30), index_of([64] * 10)
    alone = held(rows_of(stream_of(one), 30))
    mixed = stream_of(one, other, rates=[1.0, 1.0])
    assert held(rows_of(mixed, 60)) == alone


def test_parts_of_epochs() -> None:
    stream = stream_of(index_of([64] * 10), max_epochs=[0.5])
    assert len(set(held(all_rows(stream)))) == 5
    stream = stream_of(index_of([64] * 10), max_epochs=[1.5])
    assert sorted(Counter(held(all_rows(stream))).values()) == [1] * 5 + [2] * 5
    # 1.15 * 100 is 114.99... in binary.
    stream = stream_of(index_of([64] * 100), max_epochs=[1.15])
    assert len(held(all_rows(stream))) == 115


@pytest.mark.parametrize("max_epochs", [None, [2.0, 1.0, 9.0]])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_rows_are_the_same_from_any_place_on(
    shuffle: bool, max_epochs: list[float] | None
) -> None:
    settings = {"shuffle": shuffle, "max_epochs": max_epochs, "packing_rows": 5}
    straight = [row_facts(row) for row in rows_of(mixed_stream(**settings), 60)]
    stream = mixed_stream(**settings)
    cursor = stream.start()
    for taken in range(0, 60, 3):
        # Through JSON, into a stream that has seen nothing, by another number of rows.
        again = Cursor.from_json(json.loads(json.dumps(cursor.as_json())))
        assert again == cursor
        assert cursor.rows == taken
        found = rows_of(mixed_stream(**settings), 60 - taken, again)
        assert [row_facts(row) for row in found] == straight[taken:]
        _, cursor = stream.take(cursor, 3)


def test_rows_are_full() -> None:
    rng = np.random.default_rng(3)
    lengths = np.exp(rng.uniform(np.log(50), np.log(30_000), 4000)).astype(int).tolist()
    stream = stream_of(index_of(lengths), seq_length=32_768, packing_rows=64)
    rows = rows_of(stream, 512)
    real = sum(int(row.length.sum()) for row in rows)
    assert real / (512 * 32_768) > 0.98


def test_what_waits_goes_first_and_memory_of_it_stays_small() -> None:
    # Three in five of a row each: no two fit, so that more wait than rows have room.
    stream = stream_of(index_of([40] * 100 + [10] * 10), packing_rows=4, max_epochs=[1.0])
    cursor, seen, waits = stream.start(), [], []
    while True:
        rows, cursor = stream.take(cursor, 4)
        if not rows:
            break
        seen += held(rows)
        waits.append(len(cursor.window.waiting))
    assert sorted(seen) == list(range(110))
    assert max(waits) <= 8


def test_shares_of_tokens_and_a_schedule() -> None:
    rng = np.random.default_rng(5)
    short, long = rng.integers(3, 12, 500).tolist(), rng.integers(40, 64, 500).tolist()
    # Even tokens at first; from 4,000 tokens on only the long ones.
    stream = stream_of(
        index_of(short), index_of(long),
        phases=[Phase(0, (1 / np.mean(short), 1 / np.mean(long))), Phase(4000, (0.0, 1.0))],
    )  # fmt: skip
    rows = rows_of(stream, 400)
    tokens: list[tuple[int, int]] = []
    for row in rows:
        tokens += zip(row.source.tolist(), row.length.tolist(), strict=True)
    drawn = sum(length for source, length in tokens if source == 0)
    # Half of the first 4,000 and nothing after.
    assert drawn == pytest.approx(2000, abs=150)
    assert stream.take(stream.start(), 400)[1].window.phase == 1
    cursor = stream.take(stream.start(), 390)[1]
    assert [row_facts(r) for r in rows_of(stream, 10, cursor)] == [row_facts(r) for r in rows[390:]]


def test_a_phase_whose_sources_end_gives_way_to_the_next() -> None:
    stream = stream_of(
        index_of([64] * 3), index_of([64] * 5),
        phases=[Phase(0, (1.0, 0.0)), Phase(10**9, (0.0, 1.0))], max_epochs=[1.0, 1.0],
    )  # fmt: skip
    rows = all_rows(stream)
    assert [row.source.tolist() for row in rows] == [[0]] * 3 + [[1]] * 5


def test_long_samples_in_parts() -> None:
    index = index_of([150, 20, 10], loss_tokens=[149, 19, 9])
    stream = stream_of(index, long_samples="split", max_epochs=[1.0])
    parts = sorted(
        (int(offset), int(length))
        for row in all_rows(stream)
        for sample, offset, length in zip(row.sample, row.offset, row.length, strict=True)
        if sample == 0
    )
    assert parts == [(0, 64), (64, 64), (128, 22)]
    cursor = Cursor.from_json(json.loads(json.dumps(stream.take(stream.start(), 1)[1].as_json())))
    again = stream_of(index, long_samples="split", max_epochs=[1.0])
    assert [row_facts(r) for r in rows_of(again, 9, cursor)] == [
        row_facts(r) for r in all_rows(stream)[1:]
    ]


def test_a_damaged_cursor_is_refused() -> None:
    good = stream_of(index_of([10])).start().as_json()
    for broken in ({}, {**good, "drawn": 3}, {**good, "waiting": [[1, 2]]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Cursor.from_json(broken)
