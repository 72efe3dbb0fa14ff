"""Builds a data set from a LLaVA-style list: checks everything once, so that training need not.

Pictures are decoded in full and bad samples are listed with the reason. All files are written
aside; the rename of `dataset.json` alone puts the new set in the place of the old one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.data.build_progress import build_progress
from megatron_vlm.data.chat import CHAT_SETTINGS, encode_conversation
from megatron_vlm.data.format import (
    BUILDING_FOLDER,
    DATASET_FILE,
    DEFAULT_SHARD_MB,
    FORMAT_VERSION,
    INDEX_FILE,
    ORIGINS_FILE,
    REJECTED_FILE,
    TOKENIZER_FILE,
    build_folders,
    current_build,
    remove_build,
    sync,
    temporary_path,
    write_atomic,
    write_synced,
)
from megatron_vlm.data.geometry import check_sizes
from megatron_vlm.data.index_file import write_columns
from megatron_vlm.data.ordered import Reserve, map_ordered, usable_cores
from megatron_vlm.data.pictures import check_picture
from megatron_vlm.data.shards import EncodedPicture, EncodedSample, ShardWriter, sample_digest
from megatron_vlm.data.source import parse_sample, read_image_files, read_source
from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer, sha256
from megatron_vlm.errors import DataError

_MAX_PENDING_BYTES = 2**30
"""Picture files held in memory at once, beyond those of the sample being written. Our choice."""


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

    folder: Path
    """Subfolder that holds every file but `dataset.json`."""
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
    inputs: Sequence[Path] = (),
) -> BuildSummary:
    """Build a data set.

    The same input gives the same bytes. An older data set in `out` stays whole, and is what a
    reader finds, until the new one is complete; then it is removed.

    Args:
        source: the LLaVA-style JSON list.
        out: folder to write; made if missing.
        tokenizer: null makes the byte-level one.
        image_root: folder that picture paths start from and stay in; null: the list's folder.
        shard_mb: megabytes after which a new shard begins.
        overwrite: replace a data set in `out`.
        workers: threads that read and decode; null: one per core that this process may use.
        show_progress: draw a progress bar on standard error.
        inputs: other files that the caller has read, which replacing must not remove.

    Raises:
        DataError: the list, the tokenizer or the folder is unfit, every sample is bad, memory
            runs out, or the disk refuses.
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
        _check_inputs(out, (source, *inputs), tokenizer)
        out.mkdir(parents=True, exist_ok=True)
        building = out / BUILDING_FOLDER
        if building.exists():
            remove_build(building)
        building.mkdir(exist_ok=True)
        writer = ShardWriter(building, shard_mb * 2**20)
        try:
            encode = partial(_encode_entry, tokenizer=tokenizer, root=root)
            rejected = _write_samples(writer, entries, encode, workers, show_progress)
            if len(rejected) == len(entries):
                raise DataError(
                    f"{source}: all {len(entries)} samples are bad; the first: {rejected[0].reason}"
                )
            return _publish(writer, out, tokenizer, rejected, (source.name,))
        finally:
            writer.abort()
            if building.exists():
                remove_build(building)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot be written ({error.strerror}); choose another "
            "folder or make room"
        ) from error


def _encode_entry(
    numbered: tuple[int, Any], reserve: Reserve, *, tokenizer: Tokenizer, root: Path
) -> EncodedSample | Rejection:
    number, entry = numbered
    try:
        sample = parse_sample(entry)
        ids, loss = encode_conversation(tokenizer, sample.turns, len(sample.images))
        files = read_image_files(root, sample.images, reserve)
        pictures = [
            _check_picture(name, encoded)
            for name, encoded in zip(sample.images, files, strict=True)
        ]
    except DataError as error:
        return Rejection(number, entry.get("id") if isinstance(entry, dict) else None, str(error))
    except MemoryError as error:
        # Not the sample's fault: elsewhere, or on fewer threads, it would have been taken.
        raise DataError(
            f"sample {number}: memory ran out while its pictures were decoded; lower --workers "
            "or take the sample out of the list"
        ) from error
    tokens = np.array([ids, loss], dtype=np.int32)
    positions = np.flatnonzero(tokens[0] == tokenizer.image_id)
    digest = sample_digest(tokens, pictures)
    return EncodedSample(number, json.dumps(entry).encode(), tokens, positions, pictures, digest)


def _check_picture(name: str, encoded: bytes) -> EncodedPicture:
    try:
        height, width, extension = check_picture(encoded)
        check_sizes(height, width)
    except DataError as error:
        raise DataError(f"image {name!r}: {error}") from error
    return EncodedPicture(encoded, extension, height, width)


def _write_samples(
    writer: ShardWriter,
    entries: list[Any],
    encode: Callable[[tuple[int, Any], Reserve], EncodedSample | Rejection],
    workers: int | None,
    show_progress: bool,
) -> list[Rejection]:
    rejected = []
    threads = workers or usable_cores()
    results = map_ordered(encode, enumerate(entries), threads, _MAX_PENDING_BYTES)
    with closing(results), build_progress(show_progress) as progress:
        task = progress.add_task("building", total=len(entries))
        for result in results:
            if isinstance(result, Rejection):
                rejected.append(result)
            else:
                writer.add(result)
            progress.advance(task)
    return rejected


def _publish(
    writer: ShardWriter,
    out: Path,
    tokenizer: Tokenizer,
    rejected: list[Rejection],
    origins: Sequence[str],
) -> BuildSummary:
    """Complete the files, move them to a folder of their own, and switch `dataset.json` to it."""
    building = out / BUILDING_FOLDER
    shards = writer.finish()
    columns = writer.columns()
    pictures = len(columns["picture_size"])
    index_bytes, index_digest = write_columns(
        *(building / INDEX_FILE, len(columns["sample_entry"]), pictures),
        lambda name: (columns[name],),
    )
    sync(building / INDEX_FILE)
    names = (json.dumps(list(origins)) + "\n").encode()
    write_synced(building / ORIGINS_FILE, names)
    tokenizer_json = tokenizer.to_json().encode()
    lines = [json.dumps({"index": r.index, "id": r.id, "reason": r.reason}) for r in rejected]
    rejections = "".join(line + "\n" for line in lines).encode()
    write_synced(building / REJECTED_FILE, rejections)
    write_synced(building / TOKENIZER_FILE, tokenizer_json)

    # What all files follow from, the shards included: equal names mean equal files.
    parts = (
        *(writer.content_sha256(), writer.entries_sha256()),
        index_digest,
        *(sha256(content) for content in (names, tokenizer_json, rejections)),
    )
    folder = out / sha256("".join(parts).encode())[:16]
    summary = BuildSummary(
        folder=folder,
        samples=len(columns["sample_entry"]),
        pictures=len(columns["picture_size"]),
        text_tokens=int(columns["sample_text_tokens"].sum(dtype=np.int64)),
        loss_tokens=int(columns["sample_loss_tokens"].sum(dtype=np.int64)),
        shards=len(shards),
        rejected=tuple(rejected),
    )
    record = {
        "format_version": FORMAT_VERSION,
        "folder": folder.name,
        "kind": "conversation",
        "coordinates": {"convention": "relative"},
        "video": None,
        "samples": summary.samples,
        "pictures": summary.pictures,
        "text_tokens": summary.text_tokens,
        "loss_tokens": summary.loss_tokens,
        "rejected": len(rejected),
        "content_sha256": writer.content_sha256(),
        "shards": shards,
        "index": {"name": INDEX_FILE, "bytes": index_bytes},
        "origins": {"name": ORIGINS_FILE, "bytes": len(names), "count": len(origins)},
        "tokenizer": {
            "name": TOKENIZER_FILE,
            "sha256": sha256(tokenizer_json),
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": tokenizer.special_ids.by_token(),
        },
        "chat": CHAT_SETTINGS,
    }
    folder.mkdir(exist_ok=True)
    try:
        for shard in shards:
            os.replace(building / shard["name"], folder / shard["name"])
        for name in (REJECTED_FILE, TOKENIZER_FILE, ORIGINS_FILE, INDEX_FILE):
            os.replace(building / name, folder / name)
        sync(folder)
        write_atomic(out / DATASET_FILE, (json.dumps(record, indent=2) + "\n").encode())
    except BaseException:
        if current_build(out) != folder.name:
            remove_build(folder)
        raise
    for older in build_folders(out):
        if older != folder:
            remove_build(older)
    return summary


def _check_target(out: Path, overwrite: bool) -> None:
    """Raises DataError unless `out` is free, or holds only what a build may replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; expected a folder to write into")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    whole = current_build(out) is not None
    leftovers = {temporary_path(out / DATASET_FILE).name, *(p.name for p in build_folders(out))}
    if not whole and not names <= leftovers:
        raise DataError(
            f"{out}: is not empty and holds no data set; choose another folder or empty it"
        )
    if not overwrite:
        state = "a data set" if whole else "what an interrupted build left"
        raise DataError(f"{out}: holds {state}; choose another folder or add --overwrite")


def _check_inputs(out: Path, inputs: Sequence[Path], tokenizer: Tokenizer) -> None:
    """Raises DataError if replacing what `out` holds would remove a file that is being read."""
    if not out.is_dir():
        return
    target = out.resolve()
    doomed = (target / DATASET_FILE, *(path.resolve() for path in build_folders(out)))
    for given in inputs:
        path = given.resolve()
        if not any(path.is_relative_to(place) for place in doomed):
            continue
        # The set's own tokenizer may serve again: the new set holds the same bytes.
        if path.read_bytes() != tokenizer.to_json().encode():
            raise DataError(
                f"{given}: lies among the files that replacing {out} removes; move it, or choose "
                "another folder"
            )
