"""A pass over a data set as it is, and over a copy whose shards are damaged in many places."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.decoders import CpuDecoder
from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex, open_dataset
from megatron_vlm.data.loader import RankView, StepLoader
from megatron_vlm.data.mixture import Phase
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.data.stream import RowStream, Source
from tests.data.samples import VISION

SEQ_LENGTH = 1 << 17


def read_all(folder: Path, copy: Path) -> dict[str, Any]:
    """How many samples were read whole, and how many failed, before and after the damage."""
    index = open_dataset(folder)
    good, failed, _ = _pass(index)
    assert failed == 0
    shutil.copytree(folder, copy)
    damaged = _damage(open_dataset(copy))
    read, failed, unnamed = _pass(open_dataset(copy))
    return {
        "samples": index.num_samples,
        "pictures": index.num_pictures,
        "good": good,
        "damaged": damaged,
        "read": read,
        "failed": failed,
        "unnamed": unnamed,
    }


def _pass(index: DatasetIndex) -> tuple[int, int, int]:
    """(read, failed, failures without a name or reason) of one pass in the order of the set."""
    samples = SampleSet(index, SEQ_LENGTH, VISION)
    stream = RowStream(
        [Source("a", samples, 1.0)], [Phase(0, (1.0,))], seq_length=SEQ_LENGTH, pad_multiple=16,
        packing_rows=1, shuffle=False, seed=0,
    )  # fmt: skip
    read = failed = unnamed = 0
    with StepLoader(
        stream, [SampleReader(index)], RankView.alone(), global_batch_size=1,
        micro_batch_size=1, vision=VISION, decoder=CpuDecoder(), num_workers=2,
    ) as loader:  # fmt: skip
        for step in loader:
            bad = {failure.document for failure in step.failures}
            failed += len(bad)
            read += step.plan.documents - len(bad)
            unnamed += sum(
                not failure.reason or "sample " not in failure.name for failure in step.failures
            )
    return read, failed, unnamed


def _damage(index: DatasetIndex) -> int:
    """Overwrite parts of every third sample's text or pictures; how many were touched."""
    rng = np.random.default_rng(5)
    columns, touched = index.columns, 0
    for sample in range(0, index.num_samples, 3):
        pictures = index.picture_range(sample)
        if sample % 2 and len(pictures):
            place = pictures.start
            shard, offset = columns.picture_shard[place], int(columns.picture_offset[place])
            size = int(columns.picture_size[place])
        else:
            shard, offset = columns.sample_shard[sample], int(columns.sample_offset[sample])
            size = int(columns.sample_size[sample])
        start = int(rng.integers(size))
        length = int(rng.integers(1, 200))
        with (index.folder / index.shard_names[int(shard)]).open("r+b") as file:
            file.seek(offset + start)
            file.write(rng.bytes(min(length, size - start)))
        touched += 1
    return touched
