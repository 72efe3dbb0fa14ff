"""Small data sets, indexes and configurations that the data tests share."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.config.model_schema import VisionConfig
from megatron_vlm.data.balance import EncoderCost
from megatron_vlm.data.build import build_dataset
from megatron_vlm.data.format import STILL
from megatron_vlm.data.index import DatasetIndex, IndexColumns, open_dataset
from megatron_vlm.data.mixture import Phase
from megatron_vlm.data.plan import MicroBatchPlan, StepPlan
from megatron_vlm.data.rows import Cursor, Row
from megatron_vlm.data.sample_set import SampleSet
from megatron_vlm.data.sharing import Sharing
from megatron_vlm.data.stream import RowStream, Source
from megatron_vlm.data.tokenizer import SpecialIds

VISION = VisionConfig(
    num_layers=1,
    hidden_size=32,
    num_attention_heads=2,
    ffn_hidden_size=64,
    min_pixels=784,
    max_pixels=50176,
)
"""28-pixel merged patches; at most 64 of them a picture."""

BYTE_IDS = SpecialIds(pad=256, eos=257, image=258, system=259, user=260, assistant=261, end=262)


def stream_of(
    *indexes: DatasetIndex,
    seq_length: int = 64,
    vision: VisionConfig | None = None,
    long_samples: Any = "refuse",
    rates: Sequence[float] | None = None,
    phases: Sequence[Phase] | None = None,
    max_epochs: Sequence[float | None] | None = None,
    **changes: Any,
) -> RowStream:
    """A stream over a few sets, named a, b, ...; without rates, each by its number of samples."""
    sets = [SampleSet(index, seq_length, vision, long_samples) for index in indexes]
    limits = max_epochs or [None] * len(sets)
    rates = rates or [float(each.num_items) for each in sets]
    sources = [
        Source(chr(97 + number), each, limit)
        for number, (each, limit) in enumerate(zip(sets, limits, strict=True))
    ]
    settings = {"pad_multiple": 16, "packing_rows": 4, "shuffle": True, "seed": 5, **changes}
    return RowStream(sources, phases or [Phase(0, tuple(rates))], seq_length=seq_length, **settings)


def rows_of(stream: RowStream, count: int, cursor: Cursor | None = None) -> list[Row]:
    """The next rows, from the start or from a cursor."""
    return stream.take(cursor or stream.start(), count)[0]


def row_facts(row: Row) -> tuple[Any, ...]:
    """A row as plain values that can be compared."""
    columns = (row.source, row.sample, row.offset, row.start, row.length, row.padded)
    return (row.number, *(column.tolist() for column in columns))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise, so that no two pixels may be exchanged unnoticed."""
    rng = np.random.default_rng([seed, height, width])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def entry(question: str, answer: str, images: Sequence[str] = (), **fields: Any) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **fields,
    }
    if images:
        sample["images"] = list(images)
    return sample


def mixed_entries(folder: Path, count: int = 24) -> list[dict[str, Any]]:
    """Samples with none, one, two and three pictures of many sizes; writes the pictures."""
    rng = np.random.default_rng(7)
    entries = []
    for number in range(count):
        names = []
        for ordinal in range(number % 4):
            height, width = (int(side) for side in rng.integers(15, 200, 2))
            name = f"{number}-{ordinal}.png"
            picture(height, width, number).save(folder / name)
            names.append(name)
        marks = "".join(f"<image> p{ordinal} " for ordinal in range(len(names)))
        answer = "x" * int(rng.integers(1, 60))
        entries.append(entry(f"q{number} {marks}?", answer, names, id=number))
    return entries


def build(folder: Path, entries: Sequence[Any], **options: Any) -> DatasetIndex:
    """Build `entries` into `folder/set`; their pictures lie in `folder`."""
    source = folder / "source.json"
    source.write_text(json.dumps(entries))
    build_dataset(source, folder / "set", **{"workers": 2, **options})
    return open_dataset(folder / "set")


def files_of(folder: Path) -> Path:
    """The subfolder that holds the files of the set in `folder/set`."""
    return folder / "set" / str(json.loads((folder / "set" / "dataset.json").read_text())["folder"])


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def index_of(
    text_tokens: Sequence[int],
    pictures: Sequence[Sequence[tuple[int, int, int]]] | None = None,
    kind: Any = "conversation",
    loss_tokens: Sequence[int] | None = None,
    max_tokens: int = 0,
) -> DatasetIndex:
    """An index without a data set: text tokens, and (position, height, width) of the pictures."""
    pictures = pictures or [[] for _ in text_tokens]
    flat = [item for sample in pictures for item in sample]
    starts = np.cumsum([0, *map(len, pictures)])
    count = len(text_tokens)
    columns = IndexColumns(
        sample_entry=np.arange(count, dtype=np.int64),
        sample_draft=np.zeros(count, np.int32),
        sample_origin=np.zeros(count, np.int32),
        sample_shard=np.zeros(count, np.int32),
        sample_offset=np.zeros(count, np.int64),
        sample_size=np.zeros(count, np.int64),
        sample_text_tokens=np.array(text_tokens, np.int32),
        sample_loss_tokens=(
            np.array(text_tokens, np.int32) // 2
            if loss_tokens is None
            else np.array(loss_tokens, np.int32)
        ),
        sample_picture_start=starts.astype(np.int64),
        picture_shard=np.zeros(len(flat), np.int32),
        picture_offset=np.zeros(len(flat), np.int64),
        picture_size=np.zeros(len(flat), np.int64),
        picture_height=np.array([item[1] for item in flat], np.int32),
        picture_width=np.array([item[2] for item in flat], np.int32),
        picture_position=np.array([item[0] for item in flat], np.int32),
        picture_max_tokens=np.full(len(flat), max_tokens, np.int32),
        picture_pts=np.full(len(flat), STILL, np.int64),
    )
    return DatasetIndex(
        path=Path("unwritten"),
        folder=Path("unwritten"),
        shard_names=("shard-00000.tar",),
        shard_sizes=(0,),
        special_ids=BYTE_IDS,
        vocab_size=263,
        tokenizer_sha256="",
        content_sha256="",
        kind=kind,
        coordinates={"convention": "relative"},
        video=None,
        template=None,
        columns=columns,
    )


def sharing_of(world_size: int, num_replicas: int = 1, **options: Any) -> Sharing:
    """Ranks of a replica side by side; pictures cost what they have patches."""
    replicas = tuple(rank * num_replicas // world_size for rank in range(world_size))
    return Sharing(replicas, EncoderCost(0.0, 1.0, 0.0), **options)


def plan_facts(plan: StepPlan) -> tuple[Any, ...]:
    """A plan as plain values that can be compared."""
    micro = [[micro_facts(item) for item in replica] for replica in plan.micro_batches]
    pictures = list(plan.pictures), plan.shares.rank.tolist()
    return (plan.first_row, micro, pictures, plan.loss_tokens, plan.tokens, plan.documents)


def micro_facts(plan: MicroBatchPlan) -> tuple[Any, ...]:
    """A micro-batch as plain values that can be compared."""
    return (
        [row_facts(row) for row in plan.rows],
        plan.cu_seqlens.tolist(),
        plan.segment_lengths.tolist(),
        plan.max_seqlen,
        plan.picture_spans.tolist(),
    )
