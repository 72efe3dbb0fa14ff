"""Tensors of a micro-batch, checked by decoding them back and against per-sample loops."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vlm.data.collate import collate_pictures, collate_text, structure
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.pictures import patches
from megatron_vlm.data.plan import plan_rows
from megatron_vlm.data.rows import RowSource
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import DataError
from tests.data.samples import VISION, build, data_config, entry, mixed_entries, picture, plan_step

pytestmark = pytest.mark.unit

PAD, EOS, IMAGE, SYSTEM, USER, ASSISTANT, END = range(256, 263)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    folder = tmp_path_factory.mktemp("mixed")
    return build(folder, mixed_entries(folder))


def source_of(index: DatasetIndex, seq_length: int = 256, **changes: object) -> RowSource:
    return RowSource(index, seq_length, data_config(**changes), 1, VISION)


def test_text_by_hand(tmp_path: Path) -> None:
    picture(28, 56).save(tmp_path / "a.png")
    index = build(tmp_path, [entry("<image>q", "ab", ["a.png"]), entry("r", "c")])
    source = source_of(index, 32, shuffle=False)
    # 10 tokens: user, 2 of the picture, q, end, assistant, a, b, end, eos; then 8, then filler.
    plan = plan_step(source, 0, 1, 1, 1, 1).micro_batches[0][0]
    with SampleReader(index) as reader:
        text = collate_text(plan, reader, index.special_ids)
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
    source = source_of(index, packing_window=24)
    tokenizer = byte_tokenizer()
    plan = plan_step(source, 0, 8, 4, 2, 1)
    targets = 0.0
    with SampleReader(index) as reader:
        for replica in plan.micro_batches:
            for micro_batch in replica:
                text = collate_text(micro_batch, reader, index.special_ids)
                targets += float(text.loss_mask.sum())
                for k, row in enumerate(micro_batch.rows):
                    for segment in row.segments:
                        begin = k * 256 + segment.start
                        place = slice(begin, begin + segment.length)
                        ids = text.tokens[place]
                        question, answer = entries[segment.sample]["conversations"]
                        said = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
                        assert said == question["value"].replace("<image>", "") + answer["value"]
                        _, tokens = source.picture_spans(segment.sample)
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
    plan = plan_step(source_of(index), 0, 4, 4, 1, 1).micro_batches[0][0]
    with SampleReader(index) as reader:
        text = collate_text(plan, reader, index.special_ids)
    inside = torch.zeros(plan.num_tokens, dtype=torch.bool)
    for start, length in zip(plan.cu_seqlens, plan.segment_lengths, strict=False):
        inside[int(start) : int(start) + max(int(length) - 1, 0)] = True
    assert torch.equal(text.labels[:-1][inside[:-1]], text.tokens[1:][inside[:-1]])
    assert (text.labels[~inside] == PAD).all()
    assert (text.loss_mask[~inside] == 0).all()


def test_structure_by_loop(index: DatasetIndex) -> None:
    source = source_of(index)
    plan = plan_rows(source, [0, -1, 3], 3, 1, 1).micro_batches[0][0]
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


def test_a_row_of_filler_reads_nothing(index: DatasetIndex) -> None:
    plan = plan_rows(source_of(index), [-1], 1, 1, 1)
    with SampleReader(index) as reader:
        text = collate_text(plan.micro_batches[0][0], reader, index.special_ids)
        pictures = collate_pictures(plan, 0, reader, VISION)
        assert reader.bytes_read == 0
    assert (text.tokens == PAD).all()
    assert not text.loss_mask.any()
    assert pictures.pixel_values.shape == (0, 588)
    assert pictures.grid_hw.shape == (0, 2)
    assert pictures.indices.shape == (0,)


@pytest.mark.parametrize("threads", [0, 3])
def test_pictures_of_all_ranks_make_up_the_step(index: DatasetIndex, threads: int) -> None:
    plan = plan_step(source_of(index), 0, 8, 2, 2, 5)
    assert len(plan.pictures) > 5
    found = []
    with SampleReader(index) as reader, ThreadPoolExecutor(max(threads, 1)) as pool:
        for rank in range(5):
            batch = collate_pictures(plan, rank, reader, VISION, pool if threads else None)
            assert batch.pixel_values.dtype == torch.float32
            assert batch.grid_hw.dtype == batch.indices.dtype == torch.int64
            parts = batch.pixel_values.split(batch.grid_hw.prod(1).tolist())
            triples = zip(batch.indices.tolist(), batch.grid_hw, parts, strict=True)
            for place, (height, width), values in triples:
                planned = plan.pictures[place]
                assert planned.encoder_rank == rank
                assert (planned.grid_h, planned.grid_w) == (int(height), int(width))
                image = reader.read_picture(planned.sample, planned.ordinal)
                expected = patches(image, int(height), int(width), VISION)
                np.testing.assert_array_equal(values.numpy(), expected)
                found.append(place)
    assert sorted(found) == list(range(len(plan.pictures)))


def test_a_plan_of_another_set_is_refused(index: DatasetIndex) -> None:
    plan = plan_step(source_of(index), 0, 1, 1, 1, 1).micro_batches[0][0]
    [row] = plan.rows
    [first, *others] = row.segments
    changed = dataclasses.replace(first, length=first.length + 1)
    wrong = dataclasses.replace(plan, rows=(dataclasses.replace(row, segments=(changed, *others)),))
    with SampleReader(index) as reader, pytest.raises(DataError, match="plan and data set differ"):
        collate_text(wrong, reader, index.special_ids)
