"""The index of a data set: where every sample and picture lies and how large it is.

Planning needs nothing else, so the columns are flat numpy arrays mapped from the file: opening a
set of any size costs one pass over them, and no decoding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from megatron_vlm.data.format import (
    COLUMNS,
    DATASET_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    TOKENIZER_FILE,
    is_build_name,
    sample_key_name,
)
from megatron_vlm.data.tokenizer import SpecialIds, sha256
from megatron_vlm.errors import DataError

_NUMPY_OF_SAFETENSORS = {"I32": "int32", "I64": "int64"}


@dataclass(frozen=True, slots=True, eq=False)
class IndexColumns:
    """The flat columns. Offsets and sizes in bytes, heights and widths in pixels."""

    sample_key: NDArray[np.int64]
    """[samples] place in the source list; the members' base name is this, zero-padded."""
    sample_shard: NDArray[np.int32]
    """[samples] shard that holds the sample's tokens."""
    sample_offset: NDArray[np.int64]
    """[samples] first byte of the tokens member's content within the tar."""
    sample_size: NDArray[np.int64]
    """[samples] bytes of the tokens member."""
    sample_text_tokens: NDArray[np.int32]
    """[samples] tokens, each picture counted as its one placeholder."""
    sample_loss_tokens: NDArray[np.int32]
    """[samples] tokens that are targets."""
    sample_picture_start: NDArray[np.int64]
    """[samples + 1] sample i owns pictures [start[i], start[i + 1])."""
    picture_shard: NDArray[np.int32]
    """[pictures] shard that holds the picture."""
    picture_offset: NDArray[np.int64]
    """[pictures] first byte of the encoded picture within the tar."""
    picture_size: NDArray[np.int64]
    """[pictures] bytes of the encoded picture."""
    picture_height: NDArray[np.int32]
    """[pictures] height after the EXIF orientation."""
    picture_width: NDArray[np.int32]
    """[pictures] width after the EXIF orientation."""
    picture_position: NDArray[np.int32]
    """[pictures] place of its placeholder among the sample's text tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class DatasetIndex:
    """An opened data set: its shards, its special token ids, and its columns."""

    path: Path
    """The folder as it was given."""
    folder: Path
    """Its subfolder that holds the files."""
    shard_names: tuple[str, ...]
    """File names of the shards."""
    shard_sizes: tuple[int, ...]
    """Bytes of each shard."""
    special_ids: SpecialIds
    """Ids of the special tokens in the samples."""
    vocab_size: int
    """Ids of the tokenizer run from 0 to below this."""
    tokenizer_sha256: str
    """SHA-256 of `tokenizer.json`; sets that agree here share their token ids."""
    content_sha256: str
    """SHA-256 over every sample's tokens, loss flags and pictures, in order: sets that agree here
    show a model the same, whatever the size of their shards."""
    columns: IndexColumns
    """Metadata of every sample and picture."""

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return len(self.columns.sample_key)

    @property
    def num_pictures(self) -> int:
        """Pictures in the set."""
        return len(self.columns.picture_height)

    @property
    def tokenizer_path(self) -> Path:
        """The set's own copy of its tokenizer."""
        return self.folder / TOKENIZER_FILE

    def picture_range(self, sample: int) -> range:
        """The sample's pictures, as positions in the picture columns."""
        start = self.columns.sample_picture_start
        return range(int(start[sample]), int(start[sample + 1]))

    def describe(self, sample: int) -> str:
        """Names a sample in a message: its number, and the member to look for in which shard."""
        key = sample_key_name(int(self.columns.sample_key[sample]))
        shard = self.shard_names[int(self.columns.sample_shard[sample])]
        return f"{self.path}: sample {sample} ({key}.json in {shard})"


def open_dataset(path: str | Path) -> DatasetIndex:
    """Open a built data set and check that it is whole.

    The columns are checked in one pass and stay mapped from the disk; no sample is read.

    Raises:
        DataError: the folder or a file is missing, the version is unknown, a shard's size differs
            from what was recorded, or the index does not fit the shards. Names the file.
    """
    given = Path(path)
    if not given.is_dir():
        raise DataError(
            f"{given}: no such folder; expected a data set written by `mvlm data build`"
        )
    record = _read_record(given / DATASET_FILE)
    try:
        build = str(record["folder"])
        shard_names = tuple(str(shard["name"]) for shard in record["shards"])
        shard_sizes = tuple(int(shard["bytes"]) for shard in record["shards"])
        counts = (int(record["samples"]), int(record["pictures"]))
        index_bytes = int(record["index"]["bytes"])
        content = str(record["content_sha256"])
        tokenizer = record["tokenizer"]
        special_ids = SpecialIds.from_names(tokenizer["special_tokens"])
        vocab_size, digest = int(tokenizer["vocab_size"]), str(tokenizer["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{given / DATASET_FILE}: field {error} is missing or of the wrong type; "
            "build the data set again"
        ) from error
    if not is_build_name(build) or any(Path(name).name != name for name in shard_names):
        raise DataError(
            f"{given / DATASET_FILE}: folder {build!r} or a shard's name is not a plain name; "
            "build the data set again"
        )
    folder = given / build
    for name, size in zip(shard_names, shard_sizes, strict=True):
        _check_size(folder / name, size)
    _check_size(folder / INDEX_FILE, index_bytes)
    if sha256(_read_bytes(folder / TOKENIZER_FILE)) != digest:
        raise DataError(
            f"{folder / TOKENIZER_FILE}: differs from the tokenizer that the samples were encoded "
            "with; restore it or build the data set again"
        )
    columns = _map_columns(folder / INDEX_FILE)
    _check_columns(folder / INDEX_FILE, columns, counts, np.asarray(shard_sizes, dtype=np.int64))
    return DatasetIndex(
        path=given,
        folder=folder,
        shard_names=shard_names,
        shard_sizes=shard_sizes,
        special_ids=special_ids,
        vocab_size=vocab_size,
        tokenizer_sha256=digest,
        content_sha256=content,
        columns=columns,
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing; the data set is incomplete: build it again with `mvlm data build`"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); build the data set again") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version {version!r}, but this program reads {FORMAT_VERSION}; "
            "build the data set again with this version"
        )
    return record


def _check_size(path: Path, expected: int) -> None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing; the data set is incomplete: copy the file again or build again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != expected:
        raise DataError(
            f"{path}: {actual} bytes, but {DATASET_FILE} records {expected}; the file was "
            "truncated or changed: copy it again or build again"
        )


def _map_columns(path: Path) -> IndexColumns:
    """Map the columns read-only.

    safetensors checks the file and its header, but copies arrays out of it; the offsets in the
    header (the format: 8 bytes of length, JSON, raw arrays) let numpy map them in place.
    """
    try:
        with safe_open(str(path), framework="np") as checked:
            names = set(checked.keys())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable index ({error}); build it again") from error
    if names != set(COLUMNS):
        raise DataError(
            f"{path}: columns missing or unknown: {sorted(names ^ set(COLUMNS))}; build it again"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in COLUMNS.items():
        entry = header[name]
        if _NUMPY_OF_SAFETENSORS.get(entry["dtype"]) != dtype or len(entry["shape"]) != 1:
            raise DataError(
                f"{path}: column {name} is {entry['dtype']}{entry['shape']}, expected one "
                f"dimension of {dtype}; build it again"
            )
        length = entry["shape"][0]
        if not length:  # an empty range cannot be mapped
            arrays[name] = np.empty(0, dtype)
            continue
        start = 8 + header_bytes + entry["data_offsets"][0]
        # As plain arrays: reading single entries through the memmap class is several times slower.
        arrays[name] = np.memmap(path, dtype, "r", start, (length,)).view(np.ndarray)
    return IndexColumns(**arrays)


def _check_columns(
    path: Path,
    columns: IndexColumns,
    counts: tuple[int, int],
    shard_sizes: NDArray[np.int64],
) -> None:
    samples, pictures = counts
    for field in fields(columns):
        expected = samples if field.name.startswith("sample_") else pictures
        expected += field.name == "sample_picture_start"
        if len(getattr(columns, field.name)) != expected:
            raise DataError(
                f"{path}: column {field.name} has {len(getattr(columns, field.name))} entries, "
                f"but {DATASET_FILE} implies {expected}; build it again"
            )
    start = columns.sample_picture_start
    fits = start[0] == 0 and start[-1] == pictures and bool(np.all(np.diff(start) >= 0))
    for shard, offset, size in (
        (columns.sample_shard, columns.sample_offset, columns.sample_size),
        (columns.picture_shard, columns.picture_offset, columns.picture_size),
    ):
        fits = fits and bool(np.all((shard >= 0) & (shard < len(shard_sizes)) & (offset >= 0)))
        fits = fits and bool(np.all(offset + size <= shard_sizes[shard]))
    if not fits:
        raise DataError(f"{path}: points outside its shards; the index is damaged: build it again")
