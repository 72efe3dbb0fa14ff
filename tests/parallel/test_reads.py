"""What each rank reads and decodes, counted where it happens: at the reader and at the decoder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_vlm.data.fetch import SampleReader
from megatron_vlm.data.index import DatasetIndex, open_dataset
from tests.training.driver import with_run
from tests.training_case import recipe

_STEPS, _ROWS = 3, 4


class Shape(NamedTuple):
    """Sizes of a layout, whose ranks count TP first, then CP, DP and PP."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.cp * self.dp * self.pp

    def overrides(self) -> tuple[str, ...]:
        """For the recipe."""
        return (
            f"parallel.tensor_model_parallel_size={self.tp}",
            f"parallel.context_parallel_size={self.cp}",
            f"parallel.pipeline_model_parallel_size={self.pp}",
        )

    def replica(self, rank: int) -> int:
        """Data-parallel replica of a rank."""
        return rank // (self.tp * self.cp) % self.dp

    def reads_text(self, rank: int) -> bool:
        """Whether a rank's stage embeds tokens or computes the loss."""
        return rank // (self.tp * self.cp * self.dp) in (0, self.pp - 1)


class Fetched(NamedTuple):
    """What one rank did for one step."""

    samples: list[int]
    """Whose text it read."""
    pictures: list[tuple[int, int]]
    """Sample and place of each that it read."""
    decoded: list[bytes]
    """Files that its decoder was given."""
    bytes_read: int


@pytest.mark.distributed
@pytest.mark.parametrize(
    "shape",
    [
        Shape(tp=2),
        Shape(cp=2),
        Shape(pp=4),
        Shape(tp=2, pp=2),
        Shape(cp=2, dp=2),
    ],
    ids=["tp2", "cp2", "pp4", "tp2_pp2", "cp2_dp2"],
)
def test_a_rank_reads_what_it_computes_on(shape: Shape, nano_data: Path, tmp_path: Path) -> None:
    """Each picture of a step is read and decoded once over all ranks; text once by each rank of
    its replica that embeds it or computes its loss, and by no other; and not a byte besides."""
    words = ("data.prefetch_steps=0", f"training.global_batch_size={_ROWS}")
    config = recipe(nano_data, tmp_path / "run", *words, *shape.overrides())
    ranks = with_run(config, _fetched, shape.world_size)
    index = open_dataset(nano_data / "train")
    for number in range(_STEPS):
        steps = [fetched[number] for _, fetched in ranks]
        drawn = ranks[0][0][number]
        assert len(drawn) > 4
        wanted = Counter((s, k) for s in drawn for k in range(len(index.picture_range(s))))
        assert Counter(picture for step in steps for picture in step.pictures) == wanted
        with SampleReader(index) as reader:
            files = Counter(reader.read_encoded(*picture) for picture in wanted.elements())
        assert Counter(file for step in steps for file in step.decoded) == files
        # No rank is left without.
        assert min(len(step.decoded) for step in steps) > 0

        replicas: list[Counter[int]] = [Counter() for _ in range(shape.dp)]
        for rank, step in enumerate(steps):
            if shape.reads_text(rank):
                replicas[shape.replica(rank)] = Counter(step.samples)
        assert sum(replicas, Counter()) == Counter(drawn) and all(replicas)
        for rank, step in enumerate(steps):
            mine = replicas[shape.replica(rank)] if shape.reads_text(rank) else Counter()
            assert Counter(step.samples) == mine, rank
            assert step.bytes_read == _size(index, step), rank


def _fetched(run: Any) -> tuple[list[list[int]], list[Fetched]]:
    """Samples of each of the first steps, and what this rank did for it."""
    (reader,) = run.data.readers
    samples: list[int] = []
    pictures: list[tuple[int, int]] = []
    decoded: list[bytes] = []
    read_tokens, read_encoded, decode = reader.read_tokens, reader.read_encoded, run.decoder.decode

    def tokens(sample: int) -> Any:
        samples.append(sample)
        return read_tokens(sample)

    def encoded(sample: int, ordinal: int) -> bytes:
        pictures.append((sample, ordinal))
        return read_encoded(sample, ordinal)

    def decoding(jobs: Any, *args: Any) -> Any:
        decoded.extend(job.encoded for job in jobs)
        return decode(jobs, *args)

    reader.read_tokens, reader.read_encoded, run.decoder.decode = tokens, encoded, decoding
    found, drawn = [], []
    cursor = run.data.stream.start()
    with run._loader() as loader:
        for _ in range(_STEPS):
            rows, cursor = run.data.stream.take(cursor, _ROWS)
            drawn.append([int(sample) for row in rows for sample in row.sample])
            before = reader.bytes_read
            run.step.train(run._next(loader))
            found.append(
                Fetched(samples.copy(), pictures.copy(), decoded.copy(), reader.bytes_read - before)
            )
            for seen in (samples, pictures, decoded):
                seen.clear()
    return drawn, found


def _size(index: DatasetIndex, step: Fetched) -> int:
    columns = index.columns
    places = [index.picture_range(sample)[ordinal] for sample, ordinal in step.pictures]
    sizes = columns.sample_size[step.samples], columns.picture_size[places]
    return sum(int(size) for part in sizes for size in part)
