"""What a data set on disk is called and holds: file names, columns, versions, safe writing.

A data set is a folder with a `dataset.json` that names one subfolder: plain WebDataset tars beside
a flat index. The subfolder's name comes from its content, so another build never writes into it,
and the rename of `dataset.json` is the one moment at which a set appears or is replaced.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Set
from pathlib import Path

FORMAT_VERSION = 2
"""Version of the layout below; a reader refuses any other."""

DEFAULT_SHARD_MB = 256
"""Megabytes (2**20 bytes) after which a new shard begins. Our choice."""

DEFAULT_VIDEO_FPS = 1.0
"""Frames a second taken from videos that name none. Seed1.5-VL: 1."""

DEFAULT_VIDEO_TOKENS = 81920
"""Most language tokens of a video. Seed1.5-VL: 81920."""

DATASET_FILE = "dataset.json"
INDEX_FILE = "index.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.json"
ORIGINS_FILE = "origins.json"
REJECTED_FILE = "rejected.jsonl"
TEMPORARY_SUFFIX = ".tmp"

BUILDING_FOLDER = "building.tmp"
"""Where a build's files lie until all of them are complete."""

_BUILD_NAME = re.compile(r"[0-9a-f]{16}")
_BUILD_FILE = re.compile(
    r"shard-\d{5,}\.(tar|columns|rejected|json)|index\.safetensors|tokenizer\.json|origins\.json"
    r"|chat_template\.json|rejected\.jsonl|(resume|publish)\.json"
)

STILL = -(2**63)
"""`picture_pts` of a picture that is no frame of a video."""

COLUMNS: dict[str, str] = {
    # One entry a sample.
    "sample_entry": "int64",
    "sample_draft": "int32",
    "sample_origin": "int32",
    "sample_shard": "int32",
    "sample_offset": "int64",
    "sample_size": "int64",
    "sample_text_tokens": "int32",
    "sample_loss_tokens": "int32",
    # One entry more than samples: sample i owns pictures [start[i], start[i + 1]).
    "sample_picture_start": "int64",
    # One entry a picture or frame, in the order of the samples.
    "picture_shard": "int32",
    "picture_offset": "int64",
    "picture_size": "int64",
    "picture_height": "int32",
    "picture_width": "int32",
    "picture_position": "int32",
    "picture_max_tokens": "int32",
    "picture_pts": "int64",
}
"""Columns of the index and their types; `megatron_vlm.data.index.IndexColumns` says what each is.
"""


def column_length(name: str, samples: int, pictures: int) -> int:
    """Entries of a column."""
    if name == "sample_picture_start":
        return samples + 1
    return samples if name.startswith("sample_") else pictures


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.tar"


def member_key(entry: int, draft: int) -> str:
    """Base name of a sample's members: its entry's number, then its place among the entry's samples
    unless it is the first. Without a dot, at which WebDataset would end it."""
    return f"{entry:09d}-{draft}" if draft else f"{entry:09d}"


def is_build_name(name: str) -> bool:
    """True for what the folder of a build's files may be called."""
    return _BUILD_NAME.fullmatch(name) is not None


def current_build(folder: Path) -> str | None:
    """The subfolder that `dataset.json` names; null if there is no such file, or if it is not a
    record that some version of this program may have written.

    Raises:
        OSError: it is there and cannot be read.
    """
    try:
        record = json.loads((folder / DATASET_FILE).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("format_version"), int):
        return None
    name = record.get("folder")
    return name if isinstance(name, str) and is_build_name(name) else None


def build_folders(folder: Path) -> list[Path]:
    """The subfolders that builds have made, the unfinished one included."""
    return [
        path
        for path in folder.iterdir()
        if (is_build_name(path.name) or path.name == BUILDING_FOLDER)
        and path.is_dir()
        and not path.is_symlink()
    ]


def remove_build(build: Path, keep: Set[Path] = frozenset()) -> None:
    """Remove what a build writes into its folder, then the folder if that has emptied it."""
    for path in sorted(build.iterdir()):
        if path not in keep and _BUILD_FILE.fullmatch(path.name.removesuffix(TEMPORARY_SUFFIX)):
            path.unlink()
    if not any(build.iterdir()):
        build.rmdir()


def temporary_path(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def sync(path: Path) -> None:
    """Wait until a closed file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk.

    Raises:
        OSError: the disk refuses.
    """
    path.write_bytes(content)
    sync(path)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see all of it or none.

    Raises:
        OSError: the disk refuses; nothing is left of it.
    """
    temporary = temporary_path(path)
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
