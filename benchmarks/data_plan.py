"""How fast a data set of many samples is opened and planned from, how full rows are, and how much
memory that takes.

    python benchmarks/data_plan.py --json result.json
    python benchmarks/data_plan.py --samples 1e6 --folder /scratch --json result.json

An index of synthetic samples, one picture each, is written beside shards that are holes of the
right size; samples have 50 to 30,000 tokens, evenly over the logarithm. A process of its own, on
one core, then opens it, every check included, sizes every sample for a model, and plans steps of
shuffled rows of 32,768 tokens for 8 replicas and 64 ranks, so that its peak of memory (VmHWM,
mapped pages of files counted) is its own. The files were just written: they are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import parser_of, record, tell

if TYPE_CHECKING:
    from megatron_vlm.data.index import DatasetIndex

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PIECE = 1 << 20
"""Samples that are written at a time."""
SAMPLES_A_SHARD = 4096
SHORTEST, LONGEST = 50, 30_000
"""Tokens of a sample, its picture included."""
PICTURE_BYTES = 60_000
SAMPLE_BYTES = 1 << 19
"""Bytes of a shard that a sample takes."""
SEQ_LENGTH, PAD_MULTIPLE, PACKING_ROWS = 32_768, 16, 64
BATCH, REPLICAS, RANKS = 64, 8, 64
PLANNED = 200_000
"""Samples that are planned at least."""


def main() -> None:
    """Measure, print and, with `--json`, write the result; or open one data set."""
    args = parse()
    if args.open is not None:
        # Told to the process that started this one.
        print(json.dumps(open_once(args.open)))
        return
    with tempfile.TemporaryDirectory(prefix="plan_", dir=args.folder) as folder:
        write_set(Path(folder), int(args.samples))
        opened = [measure_open(Path(folder)) for _ in range(args.repetitions)]
    result = {
        "samples": int(args.samples),
        "pictures": int(args.samples),
        "open_seconds": [run["seconds"] for run in opened],
        "open_peak_bytes": max(run["peak_bytes"] for run in opened),
        "imports_peak_bytes": max(run["imports_peak_bytes"] for run in opened),
        "sizing_seconds": [run["sizing_seconds"] for run in opened],
        "planned_samples_per_second": [run["planned_samples_per_second"] for run in opened],
        "planning_peak_bytes": max(run["planning_peak_bytes"] for run in opened),
        "fill": opened[0]["fill"],
        "seq_length": SEQ_LENGTH,
        "pad_multiple": PAD_MULTIPLE,
        "packing_rows": PACKING_ROWS,
        "data": "synthetic",
        **record("megatron-vlm", "numpy", "safetensors"),
    }
    tell(result, args.json)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=float, default=1e7, help="of the data set")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--repetitions", type=int, default=3, help="times that it is opened")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_set(folder: Path, samples: int) -> None:
    """Write a data set of synthetic samples with a picture each; its shards are holes."""
    import numpy as np

    from megatron_vlm.data import format as names
    from megatron_vlm.data.index_file import write_columns
    from megatron_vlm.data.tokenizer import byte_tokenizer, sha256

    build = folder / "0123456789abcdef"
    build.mkdir()
    shards = -(-samples // SAMPLES_A_SHARD)
    for number in range(shards):
        with (build / names.shard_name(number)).open("wb") as file:
            file.truncate(SAMPLES_A_SHARD * SAMPLE_BYTES)

    def column(name: str, place: Any) -> Any:
        """Entries of a column at places of samples, which are those of the pictures too."""
        inside = place % SAMPLES_A_SHARD * SAMPLE_BYTES
        # A fraction that has nothing to do with the place; the picture's share is taken off.
        chance = place * 2_654_435_761 % (1 << 32) / (1 << 32)
        tokens = (SHORTEST * (LONGEST / SHORTEST) ** chance).astype(np.int64)
        edge = np.clip(np.sqrt(tokens // 2).astype(np.int64), 1, 64) * 28
        text = np.maximum(tokens - (edge // 28) ** 2, 2)
        return {
            "sample_entry": place,
            "sample_picture_start": place,
            "sample_shard": place // SAMPLES_A_SHARD,
            "picture_shard": place // SAMPLES_A_SHARD,
            "sample_offset": inside,
            "sample_size": 128 + 8 * text,
            "sample_text_tokens": text,
            "sample_loss_tokens": text // 2,
            "picture_offset": inside + SAMPLE_BYTES // 2,
            "picture_size": np.full_like(place, PICTURE_BYTES),
            "picture_height": edge,
            "picture_width": edge,
            "picture_position": place % 2,
            "picture_pts": np.full_like(place, names.STILL),
        }.get(name, np.zeros_like(place))

    def pieces(name: str) -> Iterator[Any]:
        length = names.column_length(name, samples, samples)
        for first in range(0, length, PIECE):
            yield column(name, np.arange(first, min(first + PIECE, length), dtype=np.int64))

    index_bytes, _ = write_columns(build / names.INDEX_FILE, samples, samples, pieces)
    tokenizer = byte_tokenizer()
    (build / names.TOKENIZER_FILE).write_text(tokenizer.to_json())
    (build / names.ORIGINS_FILE).write_text('["synthetic"]')
    record = {
        "format_version": names.FORMAT_VERSION,
        "folder": build.name,
        "kind": "conversation",
        "coordinates": {"convention": "relative"},
        "video": None,
        "chat": {},
        "samples": samples,
        "pictures": samples,
        "content_sha256": "",
        "shards": [
            {"name": names.shard_name(number), "bytes": SAMPLES_A_SHARD * SAMPLE_BYTES}
            for number in range(shards)
        ],
        "index": {"bytes": index_bytes},
        "origins": {"bytes": len('["synthetic"]'), "count": 1},
        "tokenizer": {
            "sha256": sha256(tokenizer.to_json().encode()),
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": tokenizer.special_ids.by_token(),
        },
    }
    (folder / names.DATASET_FILE).write_text(json.dumps(record))


def measure_open(folder: Path) -> dict[str, Any]:
    """Open the data set in a process of its own, on one core."""
    command = [sys.executable, __file__, "--open", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def open_once(folder: Path) -> dict[str, Any]:
    """Seconds of an opening, and this process's peaks of memory before and after it."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from megatron_vlm.data.index import open_dataset

    imports = peak_bytes()
    began = time.perf_counter()
    index = open_dataset(folder)
    found = {
        "seconds": round(time.perf_counter() - began, 3),
        "peak_bytes": peak_bytes(),
        "imports_peak_bytes": imports,
    }
    return found | plan_from(index)


def plan_from(index: DatasetIndex) -> dict[str, Any]:
    """Sizes every sample, then plans steps one after another."""
    from megatron_vlm.config.load import load_model
    from megatron_vlm.data.balance import EncoderCost
    from megatron_vlm.data.mixture import Phase
    from megatron_vlm.data.plan import plan_step
    from megatron_vlm.data.sample_set import SampleSet
    from megatron_vlm.data.sharing import Sharing
    from megatron_vlm.data.stream import RowStream, Source

    vision = load_model("dots-vlm1").vision
    began = time.perf_counter()
    samples = SampleSet(index, SEQ_LENGTH, vision)
    sizing = time.perf_counter() - began
    stream = RowStream(
        [Source("train", samples)],
        [Phase(0, (1.0,))],
        seq_length=SEQ_LENGTH,
        pad_multiple=PAD_MULTIPLE,
        packing_rows=PACKING_ROWS,
        shuffle=True,
        seed=1,
    )
    replicas = tuple(rank * REPLICAS // RANKS for rank in range(RANKS))
    sharing = Sharing(replicas, EncoderCost(0.0, 1.0, 1e-4))
    cursor, documents, tokens = stream.start(), 0, 0
    began = time.perf_counter()
    while documents < PLANNED:
        planned = plan_step(stream, cursor, BATCH, 1, sharing)
        if planned is None:
            raise SystemExit("the data ended before enough samples were planned")
        plan, cursor = planned
        documents += plan.documents
        tokens += plan.tokens
    seconds = time.perf_counter() - began
    return {
        "sizing_seconds": round(sizing, 3),
        "planned_samples_per_second": round(documents / seconds),
        "planning_peak_bytes": peak_bytes(),
        "fill": round(tokens / (cursor.rows * SEQ_LENGTH), 5),
    }


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
