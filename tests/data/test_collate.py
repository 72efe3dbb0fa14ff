"""Tensors of a micro-batch, checked by decoding them back and against per-sample loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlm.data.collate import TextBatch, collate_text, read_document, structure
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.plan import EMPTY_ROW, MicroBatchPlan, StepPlan, plan_rows, plan_step
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.data.stream import RowStream
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import DataError
from tests.data.samples import (
    BYTE_IDS,
    VISION,
    build,
    entry,
    index_of,
    mixed_entries,
    picture,
    rows_of,
    sharing_of,
    stream_of,
)

pytestmark = pytest.mark.unit

PAD, EOS, IMAGE, SYSTEM, USER, ASSISTANT, END = range(256, 263)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    folder = tmp_path_factory.mktemp("mixed")
    return build(folder, mixed_entries(folder))


def mixed_stream(index: DatasetIndex, seq_length: int = 256, **changes: object) -> RowStream:
    return stream_of(index, seq_length=seq_length, vision=VISION, seed=1, **changes)  # type: ignore[arg-type]


def first_step(stream: RowStream, batch: int, micro: int, replicas: int) -> StepPlan:
    planned = plan_step(stream, stream.start(), batch, micro, sharing_of(replicas, replicas))
    assert planned is not None
    return planned[0]


def text_of(plan: MicroBatchPlan, stream: RowStream, reader: SampleReader) -> TextBatch:
    """A micro-batch read sample by sample."""
    numbers = iter(plan.documents[plan.documents >= 0].tolist())
    documents = {}
    for row in plan.rows:
        for source, *piece in zip(
            row.source.tolist(), row.sample.tolist(), row.offset.tolist(), row.length.tolist(),
            strict=True,
        ):  # fmt: skip
            samples = stream.sources[source].samples
            documents[next(numbers)] = read_document(reader, samples, *piece)
    return collate_text(plan, documents, BYTE_IDS.pad)


def test_text_by_hand(tmp_path: Path) -> None:
    picture(28, 56).save(tmp_path / "a.png")
    index = build(tmp_path, [entry("<image>q", "ab", ["a.png"]), entry("r", "c")])
    stream = mixed_stream(index, 32, shuffle=False, max_epochs=[1.0])
    # 10 tokens: user, 2 of the picture, q, end, assistant, a, b, end, eos; then 8, then filler.
    plan = first_step(stream, 1, 1, 1).micro_batches[0][0]
    with SampleReader(index) as reader:
        text = text_of(plan, stream, reader)
    q, r, a, b, c = b"qrabc"
    first = [USER, IMAGE, IMAGE, q, END, ASSISTANT, a, b, END, EOS]
    second = [USER, r, END, ASSISTANT, c, END, EOS]
    assert text.tokens.tolist() == [*first, *[PAD] * 6, *second, *[PAD] * 9]
    labels = [*first[1:], *[PAD] * 7, *second[1:], *[PAD] * 10]
    assert text.labels.tolist() == labels
    mask = [0, 0, 0, 0, 0, 1, 1, 1, 1, 0, *[0] * 6, 0, 0, 0, 1, 1, 1, 0, *[0] * 9]
    assert text.loss_mask.tolist() == mask
    assert text.position_ids.tolist() == [*range(16), *range(16)]
    dtypes = (torch.int64, torch.int64, torch.float32, torch.int64)
    tensors = (text.tokens, text.labels, text.loss_mask, text.position_ids)
    assert tuple(t.dtype for t in tensors) == dtypes


def test_text_decodes_back_to_the_conversations(index: DatasetIndex, tmp_path: Path) -> None:
    entries = mixed_entries(tmp_path)
    stream = mixed_stream(index)
    tokenizer = byte_tokenizer()
    plan = first_step(stream, 8, 4, 2)
    targets = 0.0
    with SampleReader(index) as reader:
        for replica in plan.micro_batches:
            for micro_batch in replica:
                text = text_of(micro_batch, stream, reader)
                targets += float(text.loss_mask.sum())
                for k, row in enumerate(micro_batch.rows):
                    for sample, start, length in zip(
                        row.sample.tolist(), row.start.tolist(), row.length.tolist(), strict=True
                    ):
                        begin = k * 256 + start
                        place = slice(begin, begin + length)
                        ids = text.tokens[place]
                        question, answer = entries[sample]["conversations"]
                        said = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                        assert said == question["value"].replace("<image>", "") + answer["value"]
                        _, tokens = stream.sources[0].samples.picture_spans(sample)
                        assert int((ids == IMAGE).sum()) == tokens.sum()
                        learned = text.labels[place][text.loss_mask[place] > 0].tolist()
                        shown = tokenizer.decode(learned, skip_special_tokens=False)
                        assert shown == answer["value"] + "<|end|><|eos|>"
                spans = [range(s, s + n) for s, n in micro_batch.picture_spans.tolist()]
                marked = [t for span in spans for t in span]
                assert torch.nonzero(text.tokens == IMAGE).flatten().tolist() == marked
                layout = structure(micro_batch)
                assert torch.equal(text.tokens == PAD, layout.padding_mask)
                assert torch.equal(text.position_ids, layout.position_ids)
    assert targets == plan.loss_tokens


def test_labels_never_cross_a_segment(index: DatasetIndex) -> None:
    stream = mixed_stream(index)
    plan = first_step(stream, 4, 4, 1).micro_batches[0][0]
    with SampleReader(index) as reader:
        text = text_of(plan, stream, reader)
    inside = torch.zeros(plan.num_tokens, dtype=torch.bool)
    for start, length in zip(plan.cu_seqlens, plan.segment_lengths, strict=False):
        inside[int(start) : int(start) + max(int(length) - 1, 0)] = True
    assert torch.equal(text.labels[:-1][inside[:-1]], text.tokens[1:][inside[:-1]])
    assert (text.labels[~inside] == PAD).all()
    assert (text.loss_mask[~inside] == 0).all()


def test_structure_by_loop(index: DatasetIndex) -> None:
    stream = mixed_stream(index)
    one, _, _, other = rows_of(stream, 4)
    plan = plan_rows(stream, [one, EMPTY_ROW, other], 3, sharing_of(1)).micro_batches[0][0]
    layout = structure(plan)
    positions, padding = [], []
    for segment, length in enumerate(plan.segment_lengths):
        size = int(plan.cu_seqlens[segment + 1] - plan.cu_seqlens[segment])
        positions += list(range(size))
        padding += [t >= length for t in range(size)]
    assert layout.position_ids.tolist() == positions
    assert layout.padding_mask.tolist() == padding
    assert layout.row_ids.tolist() == [0] * 256 + [1] * 256 + [2] * 256
    assert layout.padding_mask[256:512].all()


def test_what_is_missing_is_filler(index: DatasetIndex) -> None:
    plan = plan_rows(mixed_stream(index), [EMPTY_ROW], 1, sharing_of(1)).micro_batches[0][0]
    text = collate_text(plan, {}, PAD)
    assert (text.tokens == PAD).all()
    assert not text.loss_mask.any()

    stream = mixed_stream(index)
    plan = first_step(stream, 1, 1, 1).micro_batches[0][0]
    with SampleReader(index) as reader:
        whole = text_of(plan, stream, reader)
        row = plan.rows[0]
        samples = stream.sources[0].samples
        only = read_document(reader, samples, int(row.sample[1]), 0, int(row.length[1]))
    text = collate_text(plan, {1: only}, PAD)
    start, stop = plan.cu_seqlens[1:3].tolist()
    assert torch.equal(text.tokens[start:stop], whole.tokens[start:stop])
    assert (text.tokens[:start] == PAD).all() and (text.tokens[stop:] == PAD).all()
    assert torch.equal(text.position_ids, whole.position_ids)


def test_a_part_of_a_sample(tmp_path: Path) -> None:
    picture(56, 56).save(tmp_path / "a.png")
    index = build(tmp_path, [entry("<image>" + "q" * 30, "answer", ["a.png"])])
    samples = SampleSet(index, 64, VISION)
    with SampleReader(index) as reader:
        whole = read_document(reader, samples, 0, 0, int(samples.lengths[0]))
        part = read_document(reader, samples, 0, 3, 20)
    assert whole.ids.tolist()[:6] == [USER, IMAGE, IMAGE, IMAGE, IMAGE, ord("q")]
    assert part.ids.tolist() == whole.ids.tolist()[3:23]
    assert part.flags.tolist() == whole.flags.tolist()[3:23]


def test_a_plan_of_another_set_is_refused(index: DatasetIndex) -> None:
    other = index_of([int(n) + 1 for n in index.columns.sample_text_tokens])
    samples = SampleSet(other, 256, VISION)
    with SampleReader(index) as reader, pytest.raises(DataError, match="plan and data set differ"):
        read_document(reader, samples, 0, 0, int(samples.lengths[0]))
