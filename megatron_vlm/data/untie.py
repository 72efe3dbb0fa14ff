"""Untie the Knots: documents of a row cut into chunks and shuffled, for long contexts.

The data augmentation of arXiv 2409.04774, with which dots.llm1 learned 32K contexts. A row of
documents is cut into chunks; a knot's tail ends every chunk that another follows in its document,
a knot's head begins every chunk that follows one; all chunks of all documents are shuffled. To
predict a chunk, the model has to find what came before it, far back. Optionally every chunk bears
a random ID and a document's last chunk in the row is followed by its chunks' IDs in order.

Where everything lies follows from the seed, the row's number and the documents' lengths alone, so
a plan knows its target tokens before any text is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron_vlm.data.tokenizer import ID_ALPHABET, KnotIds
from megatron_vlm.errors import ConfigError

ID_LENGTH = 6
"""Characters, and tokens, of an ID. Published code: 6."""

_SEED_STRIDE = 100_000
"""Row i is drawn from generator `seed * 100,000 + i`. Published code."""

_FIXED = 4
"""The number of chunks that stands for chunks of a fixed length. Published code."""


@dataclass(frozen=True, slots=True)
class UntieSettings:
    """How rows are cut and shuffled."""

    seed: int = 47
    """Published code's default."""
    probability: float = 0.3
    """Share of rows that are touched. Paper: 0.3 or 0.8."""
    chunk_weights: tuple[float, ...] = (0.0, 0.0, 1.0)
    """Probability that a document of a touched row is cut into 1, 2, 3, ... chunks; the fourth is
    that of chunks of `fixed_chunk_tokens`, however many. Published code's example: always 3."""
    cut: Literal["even", "random"] = "even"
    """Chunks of equal length (the last takes the rest), or cut at random places. Published code's
    default: even."""
    fixed_chunk_tokens: int = 1024
    """Tokens of a chunk of fixed length. Published code: 1,024."""
    preserve_order: bool = False
    """Keep a document's chunks in their order among each other. Published code's default: no."""
    backtrace_probability: float = 0.0
    """Share of touched rows whose chunks bear IDs, listed in order after a document's last chunk.
    Published code's default: none."""

    def __post_init__(self) -> None:
        """Raises ConfigError for settings that cannot be drawn from."""
        for name in ("probability", "backtrace_probability"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value}: expected a probability from 0 to 1")
        weights = self.chunk_weights
        if not weights or not min(weights) >= 0 or not math.isclose(sum(weights), 1, rel_tol=1e-6):
            raise ConfigError(f"chunk_weights={weights}: expected probabilities whose sum is 1")
        if self.cut not in ("even", "random"):
            raise ConfigError(f"cut={self.cut!r}: expected even or random")
        if self.fixed_chunk_tokens < 1 or self.seed < 0:
            raise ConfigError(
                f"fixed_chunk_tokens={self.fixed_chunk_tokens}, seed={self.seed}: expected at "
                "least 1 and at least 0"
            )


class Slice(NamedTuple):
    """Tokens `start` to below `stop` of a document."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens."""
        return self.stop - self.start


class Knot(NamedTuple):
    """One special token, never learned."""

    role: str
    """A key of `tokenizer.KNOT_TOKENS`."""

    @property
    def length(self) -> int:
        """Tokens: 1."""
        return 1


class Label(NamedTuple):
    """Characters of one or more IDs, each one token."""

    characters: tuple[int, ...]
    """Places in `tokenizer.ID_ALPHABET`."""
    learned: bool
    """An ID before its chunk is random and not learned; the list of a document's IDs is."""

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.characters)


Piece: TypeAlias = Slice | Knot | Label


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a row lies."""

    pieces: tuple[Piece, ...]
    """In order; the tokens of all of them are as many as the documents have."""

    @property
    def num_targets(self) -> int:
        """Target tokens, if of each document all tokens but the first are learned."""
        targets, after_special = 0, False
        for piece in self.pieces:
            if isinstance(piece, Slice):
                targets += piece.length - (piece.start == 0 or after_special)
            elif isinstance(piece, Label):
                targets += piece.learned * piece.length
            after_special = isinstance(piece, Knot)
        return targets


def layout_row(settings: UntieSettings, row: int, lengths: Sequence[int]) -> Layout:
    """Cut and shuffle one row.

    The generator is numpy's `RandomState`, whose stream is promised never to change. Drawn are, in
    this order: whether the row is touched; whether chunks bear IDs; every document's number of
    chunks; the places of every random cut; the order of the chunks; the IDs in the order of the
    chunks as placed.

    Args:
        settings: how.
        row: the row's number.
        lengths: tokens of each of its documents, at least 1.

    Returns:
        The documents one after another where the row is left alone. Else their chunks, of which
        the last of the last document stays last, cut off where the row was full before.
    """
    if lengths and min(lengths) < 1:
        raise ValueError(f"documents of {min(lengths)} tokens; expected at least 1")
    rng = _generator(settings.seed * _SEED_STRIDE + row)
    if not lengths or not rng.random_sample() < settings.probability:
        return Layout(tuple(Slice(i, 0, length) for i, length in enumerate(lengths)))
    with_ids = bool(rng.random_sample() < settings.backtrace_probability)
    chunks = _cut_documents(settings, lengths, rng)
    counts = [len(of_document) for of_document in chunks]
    places = _place(counts, settings.preserve_order, rng)
    order = [(0, 0)] * sum(counts)
    for document, of_document in enumerate(places):
        for number, place in enumerate(of_document):
            order[place] = (document, number)
    labelled = [place for place, (document, _) in enumerate(order) if counts[document] > 1]
    ids: dict[int, tuple[int, ...]] = {}
    if with_ids:
        drawn = rng.randint(len(ID_ALPHABET), size=(len(labelled), ID_LENGTH)).tolist()
        ids = {place: tuple(id_) for place, id_ in zip(labelled, drawn, strict=True)}
    pieces: list[Piece] = []
    for place, (document, number) in enumerate(order):
        if place in ids:
            pieces += [Knot("id_open"), Label(ids[place], False), Knot("id_close")]
        if number > 0:
            pieces.append(Knot("knot_head"))
        pieces.append(chunks[document][number])
        if number < counts[document] - 1:
            pieces.append(Knot("knot_tail"))
        if place in ids and place == max(places[document]):
            listed = tuple(c for chunk_place in places[document] for c in ids[chunk_place])
            pieces += [Knot("id_open"), Label(listed, True), Knot("id_close")]
    return Layout(_truncate(pieces, sum(lengths)))


def apply_layout(
    layout: Layout,
    documents: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
    knots: KnotIds,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ids and flags of a row laid out.

    As in the published code a special token is no target, and neither is the token after one, which
    may be of any document; only the list of a document's IDs, which can be told from the row, is.
    Nor is a document's first token, also where the document is a later part of a longer one.

    Args:
        layout: from `layout_row`, of these documents' lengths.
        documents: ids [length] and flags [length] of each.
        knots: of the documents' tokenizer.

    Returns:
        ids [n] and flags [n], with n the sum of the lengths.
    """
    alphabet = np.array(knots.characters, dtype=np.int32)
    ids: list[NDArray[np.int32]] = []
    flags: list[NDArray[np.int32]] = []
    after_special = False
    for piece in layout.pieces:
        if isinstance(piece, Slice):
            of_document, learned = documents[piece.document]
            ids.append(of_document[piece.start : piece.stop])
            flags.append(learned[piece.start : piece.stop].copy())
            if after_special or piece.start == 0:
                flags[-1][:1] = 0
        elif isinstance(piece, Label):
            ids.append(alphabet[list(piece.characters)])
            flags.append(np.full(piece.length, piece.learned, dtype=np.int32))
        else:
            ids.append(np.array([knots.special(piece.role)], dtype=np.int32))
            flags.append(np.zeros(1, dtype=np.int32))
        after_special = isinstance(piece, Knot)
    none = [np.zeros(0, dtype=np.int32)]
    return np.concatenate(ids or none), np.concatenate(flags or none)


def _generator(number: int) -> np.random.RandomState:
    if number < 2**32:
        return np.random.RandomState(number)
    # The generator takes one word, or many; numbers beyond one word are given as two.
    return np.random.RandomState([number % 2**32, number // 2**32])


def _cut_documents(
    settings: UntieSettings, lengths: Sequence[int], rng: np.random.RandomState
) -> list[list[Slice]]:
    """Chunks of every document, in order."""
    bounds = np.cumsum(settings.chunk_weights)
    # A sum that rounding leaves below 1 would let a draw pass the last of them.
    bounds /= bounds[-1]
    draws = rng.random_sample(len(lengths))
    counts = np.searchsorted(bounds, draws, side="right") + 1
    chunks = []
    for document, (length, count) in enumerate(zip(lengths, counts.tolist(), strict=True)):
        cuts = _cuts(settings, length, count, rng)
        edges = [0, *cuts, length]
        chunks.append([Slice(document, *edge) for edge in zip(edges, edges[1:], strict=False)])
    return chunks


def _cuts(
    settings: UntieSettings, length: int, count: int, rng: np.random.RandomState
) -> Sequence[int]:
    if count == _FIXED:
        return range(settings.fixed_chunk_tokens, length, settings.fixed_chunk_tokens)
    if length < count:
        return ()
    if settings.cut == "even":
        return [length // count * number for number in range(1, count)]
    places = rng.choice(length - 1, size=count - 1, replace=False) + 1
    return [int(place) for place in np.sort(places)]


def _place(
    counts: Sequence[int], preserve_order: bool, rng: np.random.RandomState
) -> list[list[int]]:
    """Where each chunk of each document goes."""
    total = sum(counts)
    free = [*rng.permutation(total - 1).tolist(), total - 1]
    places, start = [], 0
    for count in counts:
        taken = free[start : start + count]
        places.append(sorted(taken) if preserve_order else taken)
        start += count
    return places


def _truncate(pieces: Sequence[Piece], length: int) -> tuple[Piece, ...]:
    kept: list[Piece] = []
    for piece in pieces:
        if length <= 0:
            break
        if piece.length > length and isinstance(piece, Slice):
            piece = piece._replace(stop=piece.start + length)
        elif piece.length > length and isinstance(piece, Label):
            piece = piece._replace(characters=piece.characters[:length])
        kept.append(piece)
        length -= piece.length
    return tuple(kept)
