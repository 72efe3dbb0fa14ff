"""The end of a build: its shards' columns become one index, and the set takes its place."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_vlm.data.build_state import BuildState
from megatron_vlm.data.chat import CHAT_SETTINGS
from megatron_vlm.data.chat_template import TEMPLATE_SETTINGS
from megatron_vlm.data.draft import Source
from megatron_vlm.data.encode import EncodeSettings
from megatron_vlm.data.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    ORIGINS_FILE,
    REJECTED_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    build_folders,
    remove_build,
    sync,
    write_atomic,
    write_synced,
)
from megatron_vlm.data.index import Coordinates
from megatron_vlm.data.index_file import write_columns
from megatron_vlm.data.shards import ShardFiles, ShardRecord
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import sha256
from megatron_vlm.data.video import LEVELS

_OTHER_FILES = (REJECTED_FILE, TOKENIZER_FILE, ORIGINS_FILE, INDEX_FILE)


def complete_files(
    building: Path,
    source: Source,
    settings: EncodeSettings,
    shards: Sequence[ShardRecord],
    tail: Path,
) -> dict[str, Any]:
    """Write every file of a set but its shards, which are there, and `dataset.json`.

    Args:
        building: folder of the files.
        source: what the samples are of.
        settings: how they were encoded.
        shards: all of them, in order.
        tail: lists what was left out after the last of them.

    Returns:
        What `dataset.json` is to hold.

    Raises:
        OSError: the disk refuses.
    """
    files = [ShardFiles(building, number) for number in range(len(shards))]
    samples, pictures = (sum(getattr(s, name) for s in shards) for name in ("samples", "pictures"))

    def pieces(name: str) -> Iterator[NDArray[Any]]:
        before = 0
        for number, (shard, own) in enumerate(zip(shards, files, strict=True)):
            column = own.read_column(name, shard)
            if name == "sample_picture_start":
                # Each shard counts from its own first picture, and ends where the next begins.
                column = column[number > 0 :] + before
                before += shard.pictures
            yield column

    index_bytes, index_sha256 = write_columns(building / INDEX_FILE, samples, pictures, pieces)
    sync(building / INDEX_FILE)
    tokenizer_json = settings.tokenizer.to_json().encode()
    write_synced(building / TOKENIZER_FILE, tokenizer_json)
    template_json: list[bytes] = []
    if settings.template is not None:
        template_json.append(settings.template.to_json().encode())
        write_synced(building / TEMPLATE_FILE, template_json[0])
    origins = (json.dumps(list(source.origins)) + "\n").encode()
    write_synced(building / ORIGINS_FILE, origins)
    rejected = building / REJECTED_FILE
    rejected_sha256, rejections = _join([*(own.rejected for own in files), tail], rejected)
    content, entries = _digest_samples(shards, files)

    # What all files follow from, the shards included: equal names mean equal files.
    others = (origins, tokenizer_json, *template_json)
    parts = (content, entries, index_sha256, *map(sha256, others))
    folder = sha256("".join([*parts, rejected_sha256]).encode())[:16]
    return {
        "format_version": FORMAT_VERSION,
        "folder": folder,
        "kind": source.kind,
        "coordinates": coordinates(settings),
        "video": _video(settings) if any(shard.frames for shard in shards) else None,
        "samples": samples,
        "pictures": pictures,
        "text_tokens": sum(shard.text_tokens for shard in shards),
        "loss_tokens": sum(shard.loss_tokens for shard in shards),
        "rejected": rejections,
        "content_sha256": content,
        "rejections": {
            "name": REJECTED_FILE,
            "bytes": rejected.stat().st_size,
            "sha256": rejected_sha256,
        },
        "shards": [
            {"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256} for shard in shards
        ],
        "index": {"name": INDEX_FILE, "bytes": index_bytes, "sha256": index_sha256},
        "origins": {
            "name": ORIGINS_FILE,
            "bytes": len(origins),
            "sha256": sha256(origins),
            "count": len(source.origins),
        },
        "tokenizer": {
            "name": TOKENIZER_FILE,
            "sha256": sha256(tokenizer_json),
            "vocab_size": settings.tokenizer.vocab_size,
            "special_tokens": settings.tokenizer.special_ids.by_token(),
        },
        "chat": CHAT_SETTINGS if settings.template is None else _template(settings.template),
    }


def published_files(out: Path, record: Mapping[str, Any]) -> bool:
    """Whether every file of a set lies in its folder or on the way there."""
    places = (BuildState(out).folder, out / str(record["folder"]))
    return all(any((place / name).is_file() for place in places) for name in _names(record))


def switch(out: Path, record: Mapping[str, Any]) -> None:
    """Move the complete files to a folder of their own, and switch `dataset.json` to it.

    Killed at any moment, it may be called again.

    Raises:
        OSError: the disk refuses.
    """
    state = BuildState(out)
    folder = out / str(record["folder"])
    folder.mkdir(exist_ok=True)
    for name in _names(record):
        if (state.folder / name).is_file():
            os.replace(state.folder / name, folder / name)
    sync(folder)
    sync(out)
    write_atomic(out / DATASET_FILE, (json.dumps(record, indent=2) + "\n").encode())
    for older in build_folders(out):
        if older not in (folder, state.folder):
            remove_build(older)
    state.remove()


def coordinates(settings: EncodeSettings) -> Coordinates:
    """How coordinates are written with these settings."""
    rule = settings.seen
    if rule is None:
        return {"convention": "relative"}
    return {
        "convention": "absolute",
        "min_pixels": rule.min_pixels,
        "max_pixels": rule.max_pixels,
        "unit": rule.patch_size * rule.spatial_merge_size,
    }


def _names(record: Mapping[str, Any]) -> list[str]:
    template = [TEMPLATE_FILE] if "template" in record["chat"] else []
    return [*(str(shard["name"]) for shard in record["shards"]), *_OTHER_FILES, *template]


def _template(template: TemplateText) -> dict[str, Any]:
    return {**TEMPLATE_SETTINGS, "template": {"name": TEMPLATE_FILE, "sha256": template.sha256}}


def _video(settings: EncodeSettings) -> dict[str, Any]:
    return {
        "fps": settings.video_fps,
        "max_tokens": settings.video_max_tokens,
        "levels": list(LEVELS),
    }


def _join(paths: Sequence[Path], joined: Path) -> tuple[str, int]:
    """Write files one after another into one; returns its SHA-256 and its number of lines."""
    with joined.open("wb") as target:
        for path in paths:
            with path.open("rb") as file:
                shutil.copyfileobj(file, target)
    sync(joined)
    with joined.open("rb") as file:
        lines = sum(1 for _ in file)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest(), lines


def _digest_samples(shards: Sequence[ShardRecord], files: Sequence[ShardFiles]) -> tuple[str, str]:
    """SHA-256 over the digests of all samples, and of their entries: alike for any shard size."""
    content, entries = hashlib.sha256(), hashlib.sha256()
    for shard, own in zip(shards, files, strict=True):
        shown, kept = own.read_digests(shard)
        content.update(shown)
        entries.update(kept)
    return content.hexdigest(), entries.hexdigest()
