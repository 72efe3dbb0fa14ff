"""Builds a data set from a LLaVA-style list: checks everything once, so that training need not.

Pictures are decoded in full, bad samples are listed with the reason, and the folder looks like a
data set only when the last byte is in place.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from safetensors.numpy import save

from megatron_vlm.data.chat import CHAT_SETTINGS, encode_conversation
from megatron_vlm.data.format import (
    DATASET_FILE,
    DEFAULT_SHARD_MB,
    FORMAT_VERSION,
    INDEX_FILE,
    REJECTED_FILE,
    TEMPORARY_SUFFIX,
    TOKENIZER_FILE,
    is_own_name,
    write_atomic,
)
from megatron_vlm.data.geometry import check_sizes
from megatron_vlm.data.pictures import check_picture
from megatron_vlm.data.shards import EncodedPicture, EncodedSample, ShardWriter
from megatron_vlm.data.source import parse_sample, read_image_file, read_source
from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer, sha256
from megatron_vlm.errors import DataError

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class Rejection:
    """A sample that was left out."""

    index: int
    """Place in the source list."""
    id: Any
    """Its own `id`, if it has one."""
    reason: str


@dataclass(frozen=True, slots=True)
class BuildSummary:
    """What a build wrote."""

    samples: int
    pictures: int
    text_tokens: int
    loss_tokens: int
    shards: int
    rejected: tuple[Rejection, ...]


def build_dataset(
    source: Path,
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    image_root: Path | None = None,
    shard_mb: int = DEFAULT_SHARD_MB,
    overwrite: bool = False,
    workers: int | None = None,
    show_progress: bool = False,
) -> BuildSummary:
    """Build a data set.

    The same input gives the same bytes. An older data set in `out` is replaced only once the new
    one is complete.

    Args:
        source: the LLaVA-style JSON list.
        out: folder to write; made if missing.
        tokenizer: null makes the byte-level one.
        image_root: folder that picture paths start from and stay in; null: the list's folder.
        shard_mb: megabytes after which a new shard begins.
        overwrite: replace a data set in `out`.
        workers: threads that read and decode; null: one per core.
        show_progress: draw a progress bar on standard error.

    Raises:
        DataError: the list, the tokenizer or the folder is unfit, every sample is bad, or the disk
            refuses.
    """
    if shard_mb < 1:
        raise DataError(f"shard size {shard_mb} MB: expected at least 1")
    if workers is not None and workers < 1:
        raise DataError(f"workers {workers}: expected at least 1")
    entries = read_source(source)
    root = (source.parent if image_root is None else image_root).resolve()
    if not root.is_dir():
        raise DataError(f"image root {root}: no such folder; set --image-root")
    tokenizer = tokenizer or byte_tokenizer()
    try:
        _check_target(out, overwrite)
        out.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(out, shard_mb * 2**20)
        try:
            encode = partial(_encode_entry, tokenizer=tokenizer, root=root)
            rejected = _write_samples(writer, entries, encode, workers, show_progress)
            writer.close()
            if len(rejected) == len(entries):
                raise DataError(
                    f"{source}: all {len(entries)} samples are bad; the first: {rejected[0].reason}"
                )
            return _publish(writer, out, tokenizer, rejected)
        finally:
            writer.close()
            _remove_temporaries(out)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot be written ({error.strerror}); choose another "
            "folder or make room"
        ) from error


def _encode_entry(
    numbered: tuple[int, Any], *, tokenizer: Tokenizer, root: Path
) -> EncodedSample | Rejection:
    number, entry = numbered
    try:
        sample = parse_sample(entry)
        ids, loss = encode_conversation(tokenizer, sample.turns, len(sample.images))
        pictures = []
        for name in sample.images:
            encoded = read_image_file(root, name)
            try:
                height, width, extension = check_picture(encoded)
                check_sizes(height, width)
            except DataError as error:
                raise DataError(f"image {name!r}: {error}") from error
            pictures.append(EncodedPicture(encoded, extension, height, width))
    except DataError as error:
        return Rejection(number, entry.get("id") if isinstance(entry, dict) else None, str(error))
    tokens = np.array([ids, loss], dtype=np.int32)
    positions = np.flatnonzero(tokens[0] == tokenizer.image_id)
    return EncodedSample(number, entry, tokens, positions, pictures)


def _write_samples(
    writer: ShardWriter,
    entries: list[Any],
    encode: Callable[[tuple[int, Any]], EncodedSample | Rejection],
    workers: int | None,
    show_progress: bool,
) -> list[Rejection]:
    rejected = []
    threads = workers or os.cpu_count() or 1
    results = _map_ordered(encode, enumerate(entries), threads)
    with closing(results), _progress(show_progress) as progress:
        task = progress.add_task("building", total=len(entries))
        for result in results:
            if isinstance(result, Rejection):
                rejected.append(result)
            else:
                writer.add(result)
            progress.advance(task)
    return rejected


def _publish(
    writer: ShardWriter, out: Path, tokenizer: Tokenizer, rejected: list[Rejection]
) -> BuildSummary:
    """Swap in the finished shards; dataset.json goes first and comes last."""
    (out / DATASET_FILE).unlink(missing_ok=True)
    for path in out.iterdir():
        if is_own_name(path.name) and path.suffix != TEMPORARY_SUFFIX:
            path.unlink()
    shards = writer.publish()
    columns = writer.columns()
    index = save(columns, metadata={"format_version": str(FORMAT_VERSION)})
    tokenizer_json = tokenizer.to_json().encode()
    lines = [json.dumps({"index": r.index, "id": r.id, "reason": r.reason}) for r in rejected]
    write_atomic(out / REJECTED_FILE, "".join(line + "\n" for line in lines).encode())
    write_atomic(out / TOKENIZER_FILE, tokenizer_json)
    write_atomic(out / INDEX_FILE, index)
    summary = BuildSummary(
        samples=len(columns["sample_key"]),
        pictures=len(columns["picture_size"]),
        text_tokens=int(columns["sample_text_tokens"].sum(dtype=np.int64)),
        loss_tokens=int(columns["sample_loss_tokens"].sum(dtype=np.int64)),
        shards=len(shards),
        rejected=tuple(rejected),
    )
    record = {
        "format_version": FORMAT_VERSION,
        "samples": summary.samples,
        "pictures": summary.pictures,
        "text_tokens": summary.text_tokens,
        "loss_tokens": summary.loss_tokens,
        "rejected": len(rejected),
        "shards": shards,
        "index": {"name": INDEX_FILE, "bytes": len(index)},
        "tokenizer": {
            "name": TOKENIZER_FILE,
            "sha256": sha256(tokenizer_json),
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": tokenizer.special_ids.by_token(),
        },
        "chat": CHAT_SETTINGS,
    }
    write_atomic(out / DATASET_FILE, (json.dumps(record, indent=2) + "\n").encode())
    return summary


def _check_target(out: Path, overwrite: bool) -> None:
    """Raises DataError unless `out` is free, or holds only what a build may replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; expected a folder to write into")
    names = [path.name for path in out.iterdir()]
    if not names:
        return
    whole = DATASET_FILE in names
    if not whole and not all(is_own_name(name) for name in names):
        raise DataError(
            f"{out}: is not empty and holds no data set; choose another folder or empty it"
        )
    if not overwrite:
        state = "a data set" if whole else "what an interrupted build left"
        raise DataError(f"{out}: holds {state}; choose another folder or add --overwrite")


def _remove_temporaries(out: Path) -> None:
    for path in out.iterdir():
        if is_own_name(path.name) and path.suffix == TEMPORARY_SUFFIX:
            path.unlink()


def _map_ordered(
    function: Callable[[In], Out], items: Iterable[In], threads: int
) -> Generator[Out, None, None]:
    """Map on threads, results in order, with at most four items a thread under way."""
    pending: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 4 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class _RateColumn(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        """The rate so far, once there is one."""
        rate = task.finished_speed or task.speed
        return Text(f"{rate:,.0f} samples/s" if rate else "-")


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
