"""Untied rows on their way from a plan to tensors: one segment, counted before it is read."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.collate import structure
from megatron_vlm.data.decoders import CpuDecoder
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.loader import LoadedStep, RankView, StepLoader
from megatron_vlm.data.mixture import Phase
from megatron_vlm.data.plan import plan_step
from megatron_vlm.data.rows import Cursor
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.data.stream import RowStream, Source
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.data.untie import UntieSettings, layout_row
from megatron_vlm.errors import DataError
from tests.data.samples import BYTE_IDS, build, entry, row_facts, sharing_of

pytestmark = pytest.mark.unit

ALWAYS = UntieSettings(probability=1.0, backtrace_probability=0.5)
ALONE = RankView.alone()


def documents(folder: Path, knots: bool = True) -> DatasetIndex:
    """Forty documents of letters, each of its own length, some longer than a row."""
    rng = np.random.default_rng(3)
    lines = [
        json.dumps({"text": "".join(chr(97 + c) for c in rng.integers(0, 26, length))})
        for length in [*rng.integers(3, 90, 38), 300, 500]
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    tokenizer = byte_tokenizer().with_knots() if knots else byte_tokenizer()
    build_dataset(folder / "texts.jsonl", folder / "texts", tokenizer=tokenizer, workers=1)
    return open_dataset(folder / "texts")


def conversations(folder: Path) -> DatasetIndex:
    entries = [entry("q" * n, "a" * (50 - n)) for n in range(1, 45)]
    return build(folder, entries, tokenizer=byte_tokenizer().with_knots())


def stream_of(
    *indexes: DatasetIndex, untied: int = 0, settings: UntieSettings = ALWAYS
) -> RowStream:
    """A stream in which one source is untied."""
    sets = [SampleSet(index, 128, None, "split") for index in indexes]
    sources = [
        Source(chr(97 + number), each, 1.0, settings if number == untied else None)
        for number, each in enumerate(sets)
    ]
    rates = tuple(float(each.num_items) for each in sets)
    return RowStream(
        sources, [Phase(0, rates)], seq_length=128, pad_multiple=16, packing_rows=4, shuffle=True,
        seed=2,
    )  # fmt: skip


def steps_of(stream: RowStream, cursor: Cursor | None = None) -> list[LoadedStep]:
    readers = [SampleReader(source.samples.index) for source in stream.sources]
    with StepLoader(
        stream, readers, ALONE, cursor, global_batch_size=4, micro_batch_size=2, vision=None,
        decoder=CpuDecoder(),
    ) as loader:  # fmt: skip
        return list(islice(loader, 100))


def test_an_untied_row_is_one_segment_of_its_documents(tmp_path: Path) -> None:
    index = documents(tmp_path)
    stream = stream_of(index)
    reader = SampleReader(index)
    knots = byte_tokenizer().with_knots().knots
    specials = {knots.knot_head, knots.knot_tail, knots.id_open, knots.id_close}
    seen: dict[int, int] = {}
    touched = 0
    for step in steps_of(stream):
        loss_tokens = 0
        for micro, text in zip(step.plan.micro_batches[0], step.texts, strict=True):
            assert text is not None
            loss_tokens += int(text.loss_mask.sum())
            position_ids = structure(micro).position_ids
            for k, row in enumerate(micro.rows):
                if row.number < 0:
                    continue
                total = int(row.length.sum())
                assert row.untied
                assert np.array_equal(row.start, np.cumsum(row.length) - row.length)
                span = slice(128 * k, 128 * k + total)
                assert position_ids[span].tolist() == list(range(total))
                tokens = text.tokens[span].tolist()
                touched += bool(specials & set(tokens))
                # As the layout says, put together by hand.
                texts = [
                    reader.read_tokens(int(sample))[0][int(offset) : int(offset) + int(length)]
                    for sample, offset, length in zip(
                        row.sample, row.offset, row.length, strict=True
                    )
                ]
                expected: list[int] = []
                for piece in layout_row(ALWAYS, row.number, row.length.tolist()).pieces:
                    if hasattr(piece, "document"):
                        expected += texts[piece.document][piece.start : piece.stop].tolist()
                    elif hasattr(piece, "role"):
                        expected.append(knots.special(piece.role))
                    else:
                        expected += [knots.characters[c] for c in piece.characters]
                assert tokens == expected
                assert (text.tokens[span.stop : 128 * (k + 1)] == BYTE_IDS.pad).all()
                for sample, length in zip(row.sample.tolist(), row.length.tolist(), strict=True):
                    seen[sample] = seen.get(sample, 0) + length
        # Known from the metadata alone.
        assert loss_tokens == step.plan.loss_tokens
        assert step.plan.documents == sum(
            len(row.sample) for micro in step.plan.micro_batches[0] for row in micro.rows
        )
        assert not step.failures
    assert seen == dict(enumerate(index.columns.sample_text_tokens.tolist()))
    assert touched > 5


def test_the_end_of_a_long_document_does_not_begin_with_a_target(tmp_path: Path) -> None:
    stream = stream_of(documents(tmp_path), settings=UntieSettings(probability=0.0))
    behind_others = 0
    for step in steps_of(stream):
        masks = [text.loss_mask for text in step.texts if text is not None]
        assert sum(int(mask.sum()) for mask in masks) == step.plan.loss_tokens
        for micro, mask in zip(step.plan.micro_batches[0], masks, strict=True):
            for k, row in enumerate(micro.rows):
                # What comes before it in the row is of another document and foretells nothing.
                for start in row.start[(row.offset > 0) & (row.start > 0)].tolist():
                    assert mask[128 * k + start - 1] == 0
                    behind_others += 1
    assert behind_others


def test_untied_documents_share_no_row_with_others(tmp_path: Path) -> None:
    (tmp_path / "talk").mkdir()
    stream = stream_of(documents(tmp_path), conversations(tmp_path / "talk"))
    cursor, rows = stream.start(), []
    while True:
        found, cursor = stream.take(cursor, 3)
        if not found:
            break
        # From any place on, the same.
        again = stream_of(*(source.samples.index for source in stream.sources))
        restored = Cursor.from_json(json.loads(json.dumps(cursor.as_json())))
        assert [row_facts(row) for row in again.take(restored, 5)[0]] == [
            row_facts(row) for row in stream.take(cursor, 5)[0]
        ]
        rows += found
    assert {(row.untied, *set(row.source.tolist())) for row in rows} == {(True, 0), (False, 1)}
    full = [int(row.length.sum()) for row in rows if row.untied]
    # All but the last, which holds what the source had left.
    assert np.mean(full[:-1]) > 0.85 * 128
    assert sum(len(row.sample) for row in rows if not row.untied) == 44
    # They alternate, as they were drawn.
    assert len({row.untied for row in rows[:8]}) == 2


def test_a_document_that_fails_takes_its_row_along(tmp_path: Path) -> None:
    stream = stream_of(documents(tmp_path))
    planned = plan_step(stream, stream.start(), 4, 2, sharing_of(1))
    assert planned is not None
    failed = np.zeros(len(planned[0].document_tokens), bool)
    failed[0] = True
    left = planned[0].without(failed)
    first = planned[0].micro_batches[0][0].rows[0]
    assert left.failed == len(first.sample)
    assert left.tokens == planned[0].tokens - int(first.length.sum())


def test_a_tokenizer_without_knots_cannot_be_untied(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="knot_head"):
        _ = SampleReader(documents(tmp_path, knots=False)).knots
