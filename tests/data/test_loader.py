"""The loader: the same steps as fetching directly, faults that surface, threads that end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from megatron_vlm.data.collate import TextBatch, collate_text, read_document
from megatron_vlm.data.decoders import CpuDecoder
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.loader import LoadedStep, RankView, StepLoader
from megatron_vlm.data.pictures import patches
from megatron_vlm.data.plan import StepPlan, plan_step
from megatron_vlm.data.rows import Cursor
from megatron_vlm.data.stream import RowStream
from megatron_vlm.errors import DataError
from tests.data.samples import (
    VISION,
    build,
    entry,
    mixed_entries,
    plan_facts,
    sharing_of,
    stream_of,
)

pytestmark = pytest.mark.unit

ALONE = RankView.alone()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    build(folder, mixed_entries(folder))
    return folder


@pytest.fixture
def index(folder: Path) -> DatasetIndex:
    from megatron_vlm.data.index import open_dataset

    return open_dataset(folder / "set")


def mixed_stream(index: DatasetIndex, **changes: object) -> RowStream:
    return stream_of(index, seq_length=256, vision=VISION, seed=1, **changes)  # type: ignore[arg-type]


def loader_of(
    index: DatasetIndex,
    view: RankView = ALONE,
    cursor: Cursor | None = None,
    readers: Sequence[SampleReader] | None = None,
    **options: object,
) -> StepLoader:
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "vision": VISION, **options}
    settings.setdefault("decoder", CpuDecoder())
    readers = readers or [SampleReader(index)]
    return StepLoader(mixed_stream(index), readers, view, cursor, **settings)  # type: ignore[arg-type]


def same_text(a: TextBatch | None, b: TextBatch | None) -> bool:
    if a is None or b is None:
        return a is b
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def same_step(a: LoadedStep, b: LoadedStep) -> bool:
    names = ("pixel_values", "grid_hw", "indices")
    return (
        plan_facts(a.plan) == plan_facts(b.plan)
        and all(torch.equal(getattr(a.pictures, n), getattr(b.pictures, n)) for n in names)
        and all(same_text(x, y) for x, y in zip(a.texts, b.texts, strict=True))
        and a.cursor == b.cursor
        and a.failures == b.failures
    )


def pictures_of(folder: Path, plan: StepPlan, places: Sequence[int]) -> torch.Tensor:
    """Patches of some pictures of a step, from the files that the set was built of."""
    entries = mixed_entries(folder)
    found = []
    for place in places:
        planned = plan.pictures[place]
        name = entries[planned.sample]["images"][planned.ordinal]
        image = np.asarray(Image.open(folder / name))
        found.append(patches(image, planned.grid_h, planned.grid_w, VISION))
    return torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0, 588)


@pytest.mark.parametrize(("prefetch", "workers"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("needs_text", [True, False])
def test_loader_equals_direct(
    folder: Path, index: DatasetIndex, prefetch: int, workers: int, needs_text: bool
) -> None:
    view = RankView(2, 1, needs_text, sharing_of(4, 2))
    stream, reader = mixed_stream(index), SampleReader(index)
    cursor = stream.take(stream.start(), 5)[1]
    loader = loader_of(index, view, cursor, prefetch_steps=prefetch, num_workers=workers)
    with loader:
        for step in islice(loader, 4):
            planned = plan_step(stream, cursor, 8, 2, sharing_of(4, 2))
            assert planned is not None
            plan, cursor = planned
            assert plan_facts(step.plan) == plan_facts(plan)
            assert (step.cursor, step.replica, step.is_last) == (cursor, 1, False)
            mine = plan.shares.picture[plan.shares.rank == 2].tolist()
            assert step.pictures.indices.tolist() == mine
            grids = [[plan.pictures[i].grid_h, plan.pictures[i].grid_w] for i in mine]
            assert step.pictures.grid_hw.tolist() == grids
            assert torch.equal(step.pictures.pixel_values, pictures_of(folder, plan, mine))
            for micro, text in zip(plan.micro_batches[1], step.texts, strict=True):
                numbers = micro.documents[micro.documents >= 0].tolist()
                samples = [int(s) for row in micro.rows for s in row.sample]
                documents = {
                    number: read_document(
                        reader, stream.sources[0].samples, sample, 0,
                        int(stream.sources[0].samples.lengths[sample]),
                    )
                    for number, sample in zip(numbers, samples, strict=True)
                }  # fmt: skip
                expected = collate_text(micro, documents, 256) if needs_text else None
                assert same_text(text, expected)
            assert step.failures == ()
        assert loader.bytes_read >= reader.bytes_read
        assert loader.pictures_decoded > 0


def test_steps_do_not_depend_on_the_number_of_workers(index: DatasetIndex) -> None:
    loaders = [loader_of(index, num_workers=workers) for workers in (1, 2, 4)]
    for steps in islice(zip(*loaders, strict=True), 4):
        assert same_step(steps[0], steps[1]) and same_step(steps[0], steps[2])
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_ranks_of_any_world_make_up_the_same_rows(
    folder: Path, index: DatasetIndex, world_size: int
) -> None:
    """Text and patches of every row, put together from all ranks, are those of one process; each
    picture is decoded by one rank alone, and bytes are read no more often than replicas need."""
    with loader_of(index) as loader:
        alone = list(islice(loader, 2))
        for reader in loader._readers:
            reader.close()
    for tensor_ranks in (1, 2):
        num_replicas = world_size // tensor_ranks
        if num_replicas > 4:
            continue
        decoded = 0
        found: list[list[LoadedStep]] = []
        for rank in range(world_size):
            view = RankView(rank, rank // tensor_ranks, True, sharing_of(world_size, num_replicas))
            with loader_of(index, view, prefetch_steps=0) as loader:
                found.append([next(loader), next(loader)])
                decoded += loader.pictures_decoded
        assert decoded == sum(len(step.plan.pictures) for step in alone)
        for number, single in enumerate(alone):
            steps = [steps[number] for steps in found]
            assert text_by_row(steps) == text_by_row([single])
            pixels = {}
            for step in steps:
                parts = step.pictures.pixel_values.split(step.pictures.grid_hw.prod(1).tolist())
                for place, part in zip(step.pictures.indices.tolist(), parts, strict=True):
                    assert place not in pixels
                    pixels[place] = part
            joined = torch.cat([pixels[place] for place in sorted(pixels)])
            assert torch.equal(joined, single.pictures.pixel_values)


def text_by_row(steps: Sequence[LoadedStep]) -> dict[int, list[list[float]]]:
    """Tokens, labels and loss mask of each row by its number, from all replicas."""
    rows: dict[int, list[list[float]]] = {}
    for step in steps:
        for micro, text in zip(step.plan.micro_batches[step.replica], step.texts, strict=True):
            assert text is not None
            for k, row in enumerate(micro.rows):
                part = slice(256 * k, 256 * (k + 1))
                content = [t[part].tolist() for t in (text.tokens, text.labels, text.loss_mask)]
                assert rows.setdefault(row.number, content) == content
    return rows


def test_resuming_from_a_cursor(index: DatasetIndex) -> None:
    with loader_of(index) as straight:
        steps = list(islice(straight, 6))
    with loader_of(index, cursor=Cursor.from_json(steps[2].cursor.as_json())) as resumed:
        for step, again in zip(steps[3:], resumed, strict=False):
            assert same_step(step, again)


@pytest.mark.parametrize("max_rows", [None, 6])
def test_a_pass_over_a_held_out_set(index: DatasetIndex, max_rows: int | None) -> None:
    stream = mixed_stream(index, shuffle=False, max_epochs=[1.0])
    rows = stream.take(stream.start(), 1000)[0]
    with StepLoader(
        stream, [SampleReader(index)], ALONE, global_batch_size=4, micro_batch_size=2,
        vision=VISION, decoder=CpuDecoder(), max_rows=max_rows,
    ) as loader:  # fmt: skip
        steps = list(loader)
        assert next(loader, None) is None
    held = rows[:max_rows]
    assert len(steps) == -(-len(held) // 4)
    assert sum(step.plan.documents for step in steps) == sum(len(row.sample) for row in held)
    assert [step.is_last for step in steps][:-1] == [False] * (len(steps) - 1)
    assert steps[-1].is_last == (max_rows is None)


def test_text_only_model(tmp_path: Path) -> None:
    index = build(tmp_path, [entry("q", "a" * n) for n in range(9)])
    stream = stream_of(index, seq_length=32)
    with StepLoader(
        stream, [SampleReader(index)], ALONE, global_batch_size=2, micro_batch_size=1, vision=None,
        decoder=CpuDecoder(),
    ) as loader:  # fmt: skip
        step = next(loader)
    assert step.pictures.pixel_values.shape[0] == 0
    assert step.texts[0] is not None
    assert int(sum(text.loss_mask.sum() for text in step.texts if text)) == step.plan.loss_tokens


class FailingReader(SampleReader):
    """Cannot read the text of some samples, nor the pictures of others."""

    bad_text: frozenset[int] = frozenset()
    bad_picture: frozenset[int] = frozenset()

    def read_tokens(self, sample: int) -> NDArray[np.int32]:
        if sample in self.bad_text:
            raise DataError("shard-00007.tar: truncated")
        return super().read_tokens(sample)

    def read_encoded(self, sample: int, ordinal: int) -> bytes:
        encoded = super().read_encoded(sample, ordinal)
        return encoded[: len(encoded) // 2] if sample in self.bad_picture else encoded


def test_what_cannot_be_read_is_blank_and_named(index: DatasetIndex) -> None:
    with loader_of(index) as loader:
        good = next(loader)
    with_pictures = good.plan.pictures[0].sample
    other = next(
        int(sample)
        for micro in good.plan.micro_batches[0]
        for row in micro.rows
        for sample in row.sample
        if sample != with_pictures
    )
    reader = FailingReader(index)
    reader.bad_text, reader.bad_picture = frozenset({other}), frozenset({with_pictures})
    with loader_of(index, readers=[reader], num_workers=2) as loader:
        step = next(loader)
    assert plan_facts(step.plan) == plan_facts(good.plan)
    named = {(failure.document, failure.name.split(" (")[0]) for failure in step.failures}
    numbers = {
        int(document): int(sample)
        for micro in good.plan.micro_batches[0]
        for document, sample in zip(
            micro.documents[micro.documents >= 0],
            [s for row in micro.rows for s in row.sample],
            strict=True,
        )
    }
    assert {numbers[document] for document, _ in named} == {other, with_pictures}
    assert any("truncated" in failure.reason for failure in step.failures)
    assert all(str(index.path) in failure.name for failure in step.failures)
    # Pictures of the bad one are blank, all others as they were.
    ends = good.pictures.grid_hw.prod(1).cumsum(0).tolist()
    for place, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        same = torch.equal(
            step.pictures.pixel_values[begin:end], good.pictures.pixel_values[begin:end]
        )
        blank = not step.pictures.pixel_values[begin:end].any()
        bad = good.plan.pictures[place].sample == with_pictures
        assert (same, blank) == (not bad, bad)
    # Once the ranks agree, the text of both is gone, with its loss.
    failed = np.zeros(good.plan.documents, bool)
    failed[[document for document, _ in named]] = True
    left = step.without(failed, 256)
    assert left.plan.failed == failed.sum()
    for micro, text, before in zip(left.plan.micro_batches[0], left.texts, good.texts, strict=True):
        assert text is not None and before is not None
        for start, stop, number in zip(
            micro.cu_seqlens, micro.cu_seqlens[1:], micro.documents, strict=False
        ):
            span = slice(int(start), int(stop))
            if number >= 0 and failed[number]:
                assert (text.tokens[span] == 256).all() and (text.labels[span] == 256).all()
                assert not text.loss_mask[span].any()
            else:
                assert torch.equal(text.tokens[span], before.tokens[span])
                assert torch.equal(text.loss_mask[span], before.loss_mask[span])
    assert sum(int(t.loss_mask.sum()) for t in left.texts if t) == left.plan.loss_tokens


class GatedReader(SampleReader):
    """Reads tokens only once its gate is open, and counts how often."""

    def __init__(self, index: DatasetIndex) -> None:
        super().__init__(index)
        self.reads = 0
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.blocks: int | None = None
        """The sample that waits for the gate; null: all."""

    def read_tokens(self, sample: int) -> NDArray[np.int32]:
        self.entered.set()
        if self.blocks in (None, sample):
            assert self.gate.wait(60)
        self.reads += 1
        return super().read_tokens(sample)


def test_a_sample_that_blocks_is_named_and_given_up(
    index: DatasetIndex, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    reader = GatedReader(index)
    with loader_of(index) as loader:
        good = next(loader)
    reader.blocks = int(good.plan.micro_batches[0][0].rows[0].sample[0])
    options = {"warn_seconds": 0.2, "timeout_seconds": 2.0}
    with loader_of(index, readers=[reader], **options) as loader:  # type: ignore[arg-type]
        step, after = next(loader), next(loader)
        reader.gate.set()
    assert [failure.document for failure in step.failures] == [0]
    assert "gave up after" in step.failures[0].reason
    assert any(f"sample {reader.blocks} " in record.message for record in caplog.records)
    assert after.plan.first_row == 8


def settles_at(reader: GatedReader, expected: int) -> bool:
    """True if the reads reach the number, however slow the machine, and stay there."""
    deadline = time.monotonic() + 60
    while reader.reads < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    return reader.reads == expected


def test_no_more_than_asked_is_fetched_ahead(index: DatasetIndex) -> None:
    reader = GatedReader(index)
    reader.gate.set()
    stream = mixed_stream(index)
    rows = stream.take(stream.start(), 24)[0]
    per_step = [sum(len(row.sample) for row in rows[first : first + 8]) for first in (0, 8, 16)]
    with loader_of(index, readers=[reader], prefetch_steps=2) as loader:
        assert settles_at(reader, sum(per_step[:2]))
        next(loader)
        assert settles_at(reader, sum(per_step[:3]))


def test_waiting_is_counted(index: DatasetIndex) -> None:
    reader = GatedReader(index)
    with loader_of(index, readers=[reader]) as loader:
        assert reader.entered.wait(60)
        timer = threading.Timer(0.3, reader.gate.set)
        started = time.perf_counter()
        timer.start()
        next(loader)
        elapsed = time.perf_counter() - started
        assert 0.1 <= loader.wait_seconds <= elapsed
        waited = loader.wait_seconds
        time.sleep(0.1)
        assert loader.wait_seconds == waited  # the consumer's own time does not count


def test_closing_in_the_middle_of_a_fetch(index: DatasetIndex) -> None:
    reader = GatedReader(index)
    loader = loader_of(index, readers=[reader])
    assert reader.entered.wait(60)
    # Without waiting for what may never end.
    loader.close()
    assert not reader.gate.is_set()
    assert not [t for t in threading.enumerate() if t.name == "step-loader"]
    assert next(loader, None) is None
    loader.close()
    reader.gate.set()
