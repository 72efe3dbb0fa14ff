"""What a data set on disk is called and holds: file names, columns, versions, safe writing.

A data set is a folder of plain WebDataset tars beside a flat index. Its `dataset.json` is written
last, so a folder that has one is whole.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

FORMAT_VERSION = 1
"""Version of the layout below; a reader refuses any other."""

DEFAULT_SHARD_MB = 256
"""Megabytes (2**20 bytes) after which a new shard begins. Our choice."""

DATASET_FILE = "dataset.json"
INDEX_FILE = "index.safetensors"
TOKENIZER_FILE = "tokenizer.json"
REJECTED_FILE = "rejected.jsonl"
TEMPORARY_SUFFIX = ".tmp"

_OWN_NAME = re.compile(
    r"(shard-\d{5,}\.tar|dataset\.json|index\.safetensors|tokenizer\.json|rejected\.jsonl)(\.tmp)?"
)

COLUMNS: dict[str, str] = {
    # One entry a sample.
    "sample_key": "int64",
    "sample_shard": "int32",
    "sample_offset": "int64",
    "sample_size": "int64",
    "sample_text_tokens": "int32",
    "sample_loss_tokens": "int32",
    # One entry more than samples: sample i owns pictures [start[i], start[i + 1]).
    "sample_picture_start": "int64",
    # One entry a picture, in the order of the samples.
    "picture_shard": "int32",
    "picture_offset": "int64",
    "picture_size": "int64",
    "picture_height": "int32",
    "picture_width": "int32",
    "picture_position": "int32",
}
"""Columns of the index and their types; `megatron_vlm.data.index.DatasetIndex` says what each is.
"""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def sample_key_name(key: int) -> str:
    """Base name of a sample's members: its place in the source list, zero-padded."""
    return f"{key:09d}"


def is_own_name(name: str) -> bool:
    """True for every file name that building a data set can leave in its folder."""
    return _OWN_NAME.fullmatch(name) is not None


def temporary_path(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def sync_file(path: Path) -> None:
    """Wait until a closed file's bytes are on the disk, so that a rename never precedes them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see all of it or none.

    Raises:
        OSError: the disk refuses.
    """
    temporary = temporary_path(path)
    temporary.write_bytes(content)
    sync_file(temporary)
    os.replace(temporary, path)
