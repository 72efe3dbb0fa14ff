"""Megatron's tokenized text (`.bin` and `.idx`) as documents. All of it is learned.

The index says how long each sequence is, where it lies in the `.bin`, and which sequences make a
document. Nothing in it is believed before it is checked against the sizes of both files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.draft import Draft, Part, Special, Tokens
from megatron_vlm.data.sources.byte_ranges import ByteRange, files_below, names_of
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.records import Record, RecordSource
from megatron_vlm.data.sources.strict_json import write_json
from megatron_vlm.data.tokenizer import Tokenizer
from megatron_vlm.errors import DataError

MAX_DOCUMENT_TOKENS = 2**24
"""Longest document that is read. Our choice."""

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = len(_MAGIC) + 8 + 1 + 8 + 8
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Of integers, by their code in the index; 6 and 7 are floats, which are no ids."""
_CHECKED_AT_ONCE = 2**20

_Number = TypeVar("_Number", bound=np.generic)


def open_megatron_tokens(path: Path, options: SourceOptions) -> RecordSource:
    """Pairs of `.bin` and `.idx` as documents.

    Args:
        path: either file of a pair, their common beginning, or a folder of pairs.
        options: `tokenizer`, without which ids mean nothing; `end_of_document`.

    Raises:
        DataError: a file is missing or damaged, or there is no tokenizer.
    """
    if options.tokenizer is None:
        raise DataError(
            f"{path}: holds token ids, which mean something only with the tokenizer that made "
            "them; set --tokenizer"
        )
    files = files_below(_index_path(path), [".idx"], "a pair of .bin and .idx")
    names = names_of(path, files)
    ids = _Ids(options.tokenizer, options.end_of_document)
    opened = [
        _TokenFile(read_index(file), name, ids) for file, name in zip(files, names, strict=True)
    ]
    return RecordSource("document", opened, names, _load)


@dataclass(frozen=True, slots=True, eq=False)
class TokenIndex:
    """A checked `.idx`, mapped to memory."""

    bin_path: Path
    dtype: np.dtype[np.generic]
    lengths: NDArray[np.int32]
    """Tokens of each sequence [sequences]."""
    pointers: NDArray[np.int64]
    """Byte of the `.bin` at which each begins [sequences]."""
    documents: NDArray[np.int64]
    """Document i is made of sequences [documents[i], documents[i + 1])."""


def read_index(path: Path) -> TokenIndex:
    """Open the `.idx` of a pair, and check it against its `.bin`.

    Raises:
        DataError: either is missing or damaged, or it is of a kind that is not read; names it.
    """
    bin_path = path.with_suffix(".bin")
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        size, bin_size = path.stat().st_size, bin_path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read ({error.strerror}); .bin and .idx belong "
            "together"
        ) from error
    if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
        raise DataError(f"{path}: no Megatron index (it does not begin with MMIDIDX)")
    version = int.from_bytes(header[9:17], "little")
    if version != 1:
        raise DataError(f"{path}: index of version {version}; expected 1")
    code = header[17]
    if code not in _DTYPES:
        raise DataError(
            f"{path}: type code {code}; expected one of {', '.join(map(str, _DTYPES))}, integers"
        )
    dtype = np.dtype(_DTYPES[code])
    sequences = int.from_bytes(header[18:26], "little")
    boundaries = int.from_bytes(header[26:34], "little")
    wanted = _HEADER_BYTES + 12 * sequences + 8 * boundaries
    # A set of several modalities has one byte more a sequence.
    if size not in (wanted, wanted + sequences):
        raise DataError(
            f"{path}: {size} bytes, but {sequences} sequences and {boundaries} document "
            f"boundaries take {wanted}; it was cut off or is damaged"
        )
    offset = _HEADER_BYTES
    lengths = _map(path, np.int32, offset, sequences)
    pointers = _map(path, np.int64, offset + 4 * sequences, sequences)
    documents = _map(path, np.int64, offset + 12 * sequences, boundaries)
    if size > wanted and np.any(_map(path, np.int8, wanted, sequences)):
        raise DataError(f"{path}: holds sequences that are no text; only text is read")
    _check_sequences(path, lengths, pointers, dtype.itemsize, bin_size)
    _check_documents(path, documents, sequences)
    return TokenIndex(bin_path, dtype, lengths, pointers, documents)


@dataclass(frozen=True, slots=True)
class _Ids:
    """What ids may be in the set that is built."""

    tokenizer: Tokenizer
    end_of_document: int | None

    def parts(self, ids: NDArray[np.int64]) -> Sequence[Part]:
        wrong = np.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))
        if wrong.size:
            raise DataError(
                f"token {wrong[0]} has id {ids[wrong[0]]}; the vocabulary ends at "
                f"{self.tokenizer.vocab_size - 1}, so give the tokenizer that made the file"
            )
        if ids.size and ids[-1] == self.end_of_document:
            ids = ids[:-1]
        placeholders = np.flatnonzero(ids == self.tokenizer.image_id)
        if placeholders.size:
            raise DataError(f"token {placeholders[0]} stands for a picture, and there is none")
        if not np.any(ids != self.tokenizer.eos_id):
            raise DataError("the document is empty, so there is nothing to learn")
        tokens = Tokens(ids.astype(np.int32), True)
        if ids[-1] == self.tokenizer.eos_id:
            return (tokens,)
        return (tokens, Special("eos", True))


@dataclass(frozen=True, slots=True)
class _TokenFile:
    """The documents of a pair, as `records.RecordFile`."""

    index: TokenIndex
    name: str
    ids: _Ids

    @property
    def count(self) -> int:
        return max(0, len(self.index.documents) - 1)

    def records(self, start: int) -> Iterator[Record]:
        for number in range(start, self.count):
            yield Record(f"document {number}", number, partial(self._drafts, number))

    def _drafts(self, number: int) -> Sequence[Draft]:
        index = self.index
        first, end = (int(i) for i in index.documents[number : number + 2])
        total = int(index.lengths[first:end].sum(dtype=np.int64))
        if total > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"{total} tokens; at most {MAX_DOCUMENT_TOKENS} make one document, so split it"
            )
        # Sequences without a token are many in a damaged index, and need no reading.
        places = first + np.flatnonzero(index.lengths[first:end])
        pieces = [self._sequence(int(place)) for place in places]
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
        return [Draft(self.ids.parts(ids), (), write_json({"document": number}))]

    def _sequence(self, place: int) -> NDArray[np.int64]:
        index = self.index
        size = int(index.lengths[place]) * index.dtype.itemsize
        run = ByteRange(index.bin_path, int(index.pointers[place]), size, str(index.bin_path))
        return np.frombuffer(run.read(), index.dtype).astype(np.int64)


def _load(drafts: Sequence[Draft]) -> Sequence[Draft]:
    return drafts


def _index_path(path: Path) -> Path:
    """The `.idx` that a path stands for; the path itself if it is a folder, or an `.idx`."""
    if path.suffix == ".bin":
        return path.with_suffix(".idx")
    if path.suffix == ".idx" or path.is_dir():
        return path
    # Megatron's tools take the common beginning of both names, which may have dots of its own.
    return Path(f"{os.fspath(path)}.idx")


def _map(path: Path, dtype: type[_Number], offset: int, count: int) -> NDArray[_Number]:
    # Files and the machines that train are little-endian alike.
    if not count:
        return np.zeros(0, dtype)
    try:
        return np.memmap(path, dtype, "r", offset, (count,))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be mapped to memory ({error})") from error


def _check_sequences(
    path: Path,
    lengths: NDArray[np.int32],
    pointers: NDArray[np.int64],
    item_bytes: int,
    bin_size: int,
) -> None:
    for start in range(0, len(lengths), _CHECKED_AT_ONCE):
        some = slice(start, start + _CHECKED_AT_ONCE)
        size = lengths[some].astype(np.int64) * item_bytes
        # Subtracted, not added: a pointer near the end of 64 bits must not wrap around.
        bad = np.flatnonzero((size < 0) | (pointers[some] < 0) | (pointers[some] > bin_size - size))
        if bad.size:
            place = start + int(bad[0])
            raise DataError(
                f"{path}: sequence {place} ({lengths[place]} tokens from byte {pointers[place]}) "
                f"lies outside {path.with_suffix('.bin').name}, which has {bin_size} bytes"
            )


def _check_documents(path: Path, documents: NDArray[np.int64], sequences: int) -> None:
    wrong = documents.size == 0 or documents[0] != 0 or documents[-1] != sequences
    for start in range(0, len(documents) - 1, _CHECKED_AT_ONCE):
        piece = documents[start : start + _CHECKED_AT_ONCE + 1]
        wrong = wrong or bool(np.any(piece[1:] < piece[:-1]))
    if wrong:
        raise DataError(
            f"{path}: document boundaries do not run from 0 to {sequences}, the number of "
            "sequences; it is damaged"
        )
