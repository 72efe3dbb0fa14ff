"""The loader: the same steps as fetching directly, faults that surface, threads that end."""

from __future__ import annotations

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_vlm.data.collate import TextBatch, collate_pictures, collate_text
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex
from megatron_vlm.data.loader import LoadedStep, RankView, StepLoader
from megatron_vlm.data.plan import held_out_batches
from megatron_vlm.data.rows import RowSource
from megatron_vlm.errors import DataError
from tests.data.samples import (
    VISION,
    build,
    data_config,
    entry,
    mixed_entries,
    plan_facts,
    plan_step,
)

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    folder = tmp_path_factory.mktemp("mixed")
    return build(folder, mixed_entries(folder))


def source_of(index: DatasetIndex, **changes: object) -> RowSource:
    return RowSource(index, 256, data_config(**changes), 1, VISION)


def loader_of(
    index: DatasetIndex,
    view: RankView,
    first_row: int = 0,
    reader: SampleReader | None = None,
    **options: object,
) -> StepLoader:
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "vision": VISION, **options}
    reader = reader or SampleReader(index)
    return StepLoader(source_of(index), reader, view, first_row, **settings)  # type: ignore[arg-type]


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
    )


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 1), (1, 1), (3, 4)])
@pytest.mark.parametrize("needs_text", [True, False])
def test_loader_equals_direct(
    index: DatasetIndex, prefetch: int, threads: int, needs_text: bool
) -> None:
    view = RankView(rank=2, world_size=4, replica=1, num_replicas=2, needs_text=needs_text)
    source = source_of(index)
    with (
        loader_of(index, view, 16, prefetch_steps=prefetch, decode_threads=threads) as loader,
        SampleReader(index) as reader,
    ):
        for number, step in enumerate(islice(loader, 4)):
            plan = plan_step(source, 16 + 8 * number, 8, 2, 2, 4)
            pictures = collate_pictures(plan, 2, reader, VISION)
            texts = [
                collate_text(micro, reader, index.special_ids) if needs_text else None
                for micro in plan.micro_batches[1]
            ]
            assert same_step(step, LoadedStep(plan, pictures, texts))
        assert loader.bytes_read >= reader.bytes_read > 0
        assert loader.pictures_decoded >= reader.pictures_decoded > 0


def test_resuming_from_the_row_number(index: DatasetIndex) -> None:
    view = RankView(0, 1, 0, 1, True)
    with loader_of(index, view) as straight, loader_of(index, view, 24) as resumed:
        for step, again in zip(islice(straight, 3, 6), islice(resumed, 3), strict=True):
            assert same_step(step, again)


def test_a_pass_over_a_held_out_set(index: DatasetIndex) -> None:
    source = source_of(index, shuffle=False)
    batches = held_out_batches(source, 4)
    loader = StepLoader(
        source,
        SampleReader(index),
        RankView(0, 1, 0, 1, True),
        global_batch_size=4,
        micro_batch_size=2,
        vision=VISION,
        batches=batches,
    )
    with loader:
        steps = list(loader)
        assert next(loader, None) is None
    assert len(steps) == len(batches)
    assert sum(step.plan.documents for step in steps) == index.num_samples


def test_text_only_model(tmp_path: Path) -> None:
    index = build(tmp_path, [entry("q", "a" * n) for n in range(9)])
    source = RowSource(index, 32, data_config(), 0, None)
    view = RankView(0, 1, 0, 1, True)
    with StepLoader(
        source, SampleReader(index), view, global_batch_size=2, micro_batch_size=1, vision=None
    ) as loader:
        step = next(loader)
    assert step.pictures.pixel_values.shape[0] == 0
    assert step.texts[0] is not None
    assert int(sum(text.loss_mask.sum() for text in step.texts if text)) == step.plan.loss_tokens


@pytest.mark.parametrize("prefetch", [0, 2])
def test_faults_surface_after_the_good_steps(
    index: DatasetIndex, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = SampleReader(index)
    bad = source_of(index).row(20).segments[0].sample
    good = reader.read_tokens
    fault = DataError("shard-00007.tar: truncated")

    def read_tokens(sample: int) -> object:
        if sample == bad:
            raise fault
        return good(sample)

    monkeypatch.setattr(reader, "read_tokens", read_tokens)
    source = source_of(index)
    steps = range(0, 24, 8)
    first_bad = next(
        i
        for i, first in enumerate(steps)
        if any(s.sample == bad for r in range(first, first + 8) for s in source.row(r).segments)
    )
    view = RankView(0, 1, 0, 1, True)
    with loader_of(index, view, reader=reader, prefetch_steps=prefetch) as loader:
        for _ in range(first_bad):
            next(loader)
        with pytest.raises(DataError) as raised:
            next(loader)
        assert raised.value is fault


class GatedReader(SampleReader):
    """Reads tokens only once its gate is open, and counts how often."""

    def __init__(self, index: DatasetIndex) -> None:
        super().__init__(index)
        self.reads = 0
        self.entered = threading.Event()
        self.gate = threading.Event()

    def read_tokens(self, sample: int) -> NDArray[np.int32]:
        self.entered.set()
        assert self.gate.wait(60)
        self.reads += 1
        return super().read_tokens(sample)


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
    source = source_of(index)
    per_step = [
        sum(len(source.row(r).segments) for r in range(first, first + 8))
        for first in range(0, 40, 8)
    ]
    view = RankView(0, 1, 0, 1, True)
    with loader_of(index, view, reader=reader, prefetch_steps=2) as loader:
        assert settles_at(reader, sum(per_step[:2]))
        next(loader)
        assert settles_at(reader, sum(per_step[:3]))


def test_waiting_is_counted(index: DatasetIndex) -> None:
    reader = GatedReader(index)
    with loader_of(index, RankView(0, 1, 0, 1, True), reader=reader) as loader:
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
    loader = loader_of(index, RankView(0, 1, 0, 1, True), reader=reader)
    assert reader.entered.wait(60)
    threading.Timer(0.2, reader.gate.set).start()
    loader.close()
    assert reader.gate.is_set()  # the fetch under way was waited for
    assert not [t for t in threading.enumerate() if t.name == "step-loader"]
    assert next(loader, None) is None
    loader.close()
