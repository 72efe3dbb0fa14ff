"""The index of a data set: where every sample and picture lies and how large it is.

Planning needs nothing else, so the columns are flat numpy arrays mapped from the file: opening a
set of any size costs one pass over them, and no decoding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Required, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.draft import SampleKind
from megatron_vlm.data.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    INDEX_FILE,
    ORIGINS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    is_build_name,
    member_key,
)
from megatron_vlm.data.index_file import Limits, check_columns, find_columns, map_columns
from megatron_vlm.data.template_text import TemplateText
from megatron_vlm.data.tokenizer import SpecialIds, sha256
from megatron_vlm.errors import DataError


class Coordinates(TypedDict, total=False):
    """How coordinates are written in the samples' text."""

    convention: Required[Literal["relative", "absolute"]]
    """`relative`: thousandths of the picture's sides. `absolute`: pixels of the picture as the
    model sees it, after the rule below, which `relative` lacks."""
    min_pixels: int
    """Smaller pictures are enlarged to this many pixels."""
    max_pixels: int
    """Larger pictures are reduced to this many pixels."""
    unit: int
    """Both sides are multiples of this many pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class IndexColumns:
    """The flat columns. Offsets and sizes in bytes, heights and widths in pixels."""

    sample_entry: NDArray[np.int64]
    """[samples] number of its entry in the source."""
    sample_draft: NDArray[np.int32]
    """[samples] place among the samples of its entry; with the entry's number it gives the base
    name of the members (`format.member_key`)."""
    sample_origin: NDArray[np.int32]
    """[samples] place in `DatasetIndex.origins` of the file that it comes from."""
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
    """[pictures] shard that holds the picture, or the video that it is a frame of."""
    picture_offset: NDArray[np.int64]
    """[pictures] first byte of the encoded picture or video within the tar; samples of one entry
    may share it, and the frames of a video do."""
    picture_size: NDArray[np.int64]
    """[pictures] bytes of the encoded picture or video."""
    picture_height: NDArray[np.int32]
    """[pictures] height, upright."""
    picture_width: NDArray[np.int32]
    """[pictures] width, upright."""
    picture_position: NDArray[np.int32]
    """[pictures] place of its placeholder among the sample's text tokens."""
    picture_max_tokens: NDArray[np.int32]
    """[pictures] most language tokens it may take; 0: as many as the model's rule gives."""
    picture_pts: NDArray[np.int64]
    """[pictures] presentation time of a frame in its stream's time base; `format.STILL` for a
    picture."""


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
    """SHA-256 over every sample's tokens, loss flags and media, in order: sets that agree here
    show a model the same, whatever the size of their shards."""
    kind: SampleKind
    """What its samples are; those of a preference set come in pairs: chosen, then rejected."""
    coordinates: Coordinates
    """How coordinates are written in its text."""
    video: Mapping[str, Any] | None
    """How its videos' frames were chosen: `fps`, `max_tokens`, `levels`; null: it has none."""
    template: TemplateText | None
    """What its dialogues are written by; null: the built-in format, or it holds none."""
    columns: IndexColumns
    """Metadata of every sample and picture."""

    @property
    def has_dialogues(self) -> bool:
        """Whether its samples have turns, which some chat format has written."""
        return self.kind != "document"

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return len(self.columns.sample_entry)

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

    @property
    def origins(self) -> tuple[str, ...]:
        """Names of the source's files, read when first asked for.

        Raises:
            DataError: their list is missing or damaged.
        """
        return _read_origins(self.folder / ORIGINS_FILE)

    def describe(self, sample: int) -> str:
        """Names a sample in a message: its number, where it comes from, and where it lies."""
        columns = self.columns
        entry, draft = int(columns.sample_entry[sample]), int(columns.sample_draft[sample])
        origin = int(columns.sample_origin[sample])
        try:
            name = self.origins[origin]
        except (DataError, IndexError):  # it only helps to say what is wrong elsewhere
            name = f"file {origin} of the source"
        shard = self.shard_names[int(columns.sample_shard[sample])]
        which = f"entry {entry}" + (f", sample {draft} of it" if draft else "")
        return (
            f"{self.path}: sample {sample} ({which}, from {name}; "
            f"{member_key(entry, draft)}.json in {shard})"
        )


def open_dataset(path: str | Path) -> DatasetIndex:
    """Open a built data set and check that it is whole.

    The columns are checked in one pass of plain reads and then mapped; no sample is read.

    Raises:
        DataError: the folder or a file is missing, the version is unknown, a shard's size differs
            from what was recorded, or the index does not fit the shards. Names the file.
    """
    given = Path(path)
    if not given.is_dir():
        raise DataError(
            f"{given}: no such folder; expected a data set written by `mvlm data build`"
        )
    record = read_record(given / DATASET_FILE)
    try:
        build = str(record["folder"])
        shard_names = tuple(str(shard["name"]) for shard in record["shards"])
        shard_sizes = tuple(int(shard["bytes"]) for shard in record["shards"])
        counts = (int(record["samples"]), int(record["pictures"]))
        index_bytes = int(record["index"]["bytes"])
        content, kind = str(record["content_sha256"]), record["kind"]
        coordinates, video = record["coordinates"], record["video"]
        origins, origins_bytes = int(record["origins"]["count"]), int(record["origins"]["bytes"])
        tokenizer = record["tokenizer"]
        special_ids = SpecialIds.from_names(tokenizer["special_tokens"])
        vocab_size, digest = int(tokenizer["vocab_size"]), str(tokenizer["sha256"])
        template = record["chat"].get("template")
        template_digest = None if template is None else str(template["sha256"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{given / DATASET_FILE}: field {error} is missing or of the wrong type; "
            "build the data set again"
        ) from error
    if not is_build_name(build) or any(Path(name).name != name for name in shard_names):
        raise DataError(
            f"{given / DATASET_FILE}: folder {build!r} or a shard's name is not a plain name; "
            "build the data set again"
        )
    if kind not in get_args(SampleKind) or not _are_coordinates(coordinates):
        raise DataError(
            f"{given / DATASET_FILE}: kind {kind!r} or coordinates {coordinates!r} unknown; build "
            "the data set again with this version"
        )
    folder = given / build
    for name, size in zip(shard_names, shard_sizes, strict=True):
        _check_size(folder / name, size)
    _check_size(folder / INDEX_FILE, index_bytes)
    _check_size(folder / ORIGINS_FILE, origins_bytes)
    if sha256(_read_bytes(folder / TOKENIZER_FILE)) != digest:
        raise DataError(
            f"{folder / TOKENIZER_FILE}: differs from the tokenizer that the samples were encoded "
            "with; restore it or build the data set again"
        )
    places = find_columns(folder / INDEX_FILE)
    limits = Limits(*counts, shard_sizes, origins, kind)
    check_columns(folder / INDEX_FILE, places, limits)
    return DatasetIndex(
        path=given,
        folder=folder,
        shard_names=shard_names,
        shard_sizes=shard_sizes,
        special_ids=special_ids,
        vocab_size=vocab_size,
        tokenizer_sha256=digest,
        content_sha256=content,
        kind=kind,
        coordinates=coordinates,
        video=video,
        template=None if template_digest is None else _read_template(folder, template_digest),
        columns=IndexColumns(**map_columns(folder / INDEX_FILE, places)),
    )


def _read_template(folder: Path, digest: str) -> TemplateText:
    path = folder / TEMPLATE_FILE
    content = _read_bytes(path)
    if sha256(content) != digest:
        raise DataError(
            f"{path}: differs from the chat template that the samples were written by; restore it "
            "or build the data set again"
        )
    return TemplateText.from_json(content.decode(), str(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: missing; the data set is incomplete: build it again with `mvlm data build`"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def read_record(path: Path) -> dict[str, Any]:
    """What a `dataset.json` holds.

    Raises:
        DataError: it is missing, no JSON, or of another version.
    """
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


def _are_coordinates(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    rule = [value.get(name) for name in ("min_pixels", "max_pixels", "unit")]
    if value.get("convention") == "absolute":
        return all(isinstance(number, int) and number > 0 for number in rule)
    return value.get("convention") == "relative"


@lru_cache(maxsize=4)
def _read_origins(path: Path) -> tuple[str, ...]:
    # A build's folder is named by its content, so what was read once stays right.
    try:
        names = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); build the data set again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: expected a list of names; build the data set again")
    return tuple(names)
