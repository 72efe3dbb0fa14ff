"""Untied rows: against a slow token-by-token reference, and by what can be read back from them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from megatron_vlm.data import untie
from megatron_vlm.data.tokenizer import ID_ALPHABET, KNOT_TOKENS, Tokenizer, byte_tokenizer
from megatron_vlm.data.untie import (
    Knot,
    Label,
    Layout,
    Slice,
    UntieSettings,
    apply_layout,
    layout_row,
)
from megatron_vlm.errors import ConfigError, DataError
from tests.data.test_tokenizer import TEXTS, foreign

pytestmark = pytest.mark.unit

KNOTTED = byte_tokenizer().with_knots()
HEAD, TAIL, OPEN, CLOSE = range(263, 267)
MIXED = (0.2, 0.2, 0.2, 0.2, 0.2)
VARIANTS = [
    UntieSettings(probability=1.0, cut=cut, preserve_order=order, backtrace_probability=ids,
                  chunk_weights=weights, fixed_chunk_tokens=8)
    for cut in ("even", "random")
    for order in (False, True)
    for ids in (0.0, 0.5, 1.0)
    for weights in ((0.0, 0.0, 1.0), MIXED)
]  # fmt: skip


def rows(count: int, seed: int = 0) -> list[list[int]]:
    """Lengths of the documents of some rows."""
    rng = np.random.default_rng(seed)
    return [
        [int(n) for n in rng.integers(1, rng.choice([3, 20, 60]), rng.integers(1, 9))]
        for _ in range(count)
    ]


def documents_of(lengths: list[int]) -> list[tuple[Any, Any]]:
    """Documents whose every token is another one, learned but for the first; ids from 1,000."""
    ids = np.arange(1000, 1000 + sum(lengths), dtype=np.int32)
    found = []
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        flags = np.ones(len(part), np.int32)
        flags[0] = 0
        found.append((part, flags))
    return found


def reference(settings: UntieSettings, row: int, lengths: list[int]) -> tuple[list[int], list[int]]:
    """Ids and flags by the six steps as they are described, one token at a time."""
    documents = documents_of(lengths)
    whole = [int(i) for ids, _ in documents for i in ids]
    flag_of = {int(i): int(f) for ids, flags in documents for i, f in zip(ids, flags, strict=True)}
    # 1. The generator of the row, and whether it is touched.
    rng = np.random.RandomState(settings.seed * 100000 + row)
    if rng.random_sample() >= settings.probability:
        return whole, [flag_of[i] for i in whole]
    labelled = rng.random_sample() < settings.backtrace_probability
    # 2. Chunks of each document.
    chunk_numbers = []
    for draw in rng.random_sample(len(lengths)):
        total, number = 0.0, 0
        while True:
            total += settings.chunk_weights[number]
            number += 1
            if draw < total:
                break
        chunk_numbers.append(number)
    chunks: list[list[list[int]]] = []
    for (ids, _), number in zip(documents, chunk_numbers, strict=True):
        tokens = [int(i) for i in ids]
        if number == 4:
            size = settings.fixed_chunk_tokens
            chunks.append([tokens[i : i + size] for i in range(0, len(tokens), size)])
        elif len(tokens) < number:
            chunks.append([tokens])
        else:
            if settings.cut == "even":
                size = len(tokens) // number
                cuts = [size * k for k in range(1, number)]
            else:
                cuts = sorted(1 + rng.choice(len(tokens) - 1, number - 1, replace=False))
            chunks.append([tokens[a:b] for a, b in itertools.pairwise([0, *cuts, len(tokens)])])
    # 3. Knots.
    knotted = [
        [
            [HEAD] * (i > 0) + chunk + [TAIL] * (i < len(of_document) - 1)
            for i, chunk in enumerate(of_document)
        ]
        for of_document in chunks
    ]
    # 4. Shuffle all but the very last chunk.
    names = [(d, c) for d, of_document in enumerate(knotted) for c in range(len(of_document))]
    slots = [int(i) for i in rng.permutation(len(names) - 1)] + [len(names) - 1]
    if settings.preserve_order:
        for d in range(len(knotted)):
            mine = [i for i, name in enumerate(names) if name[0] == d]
            for i, slot in zip(mine, sorted(slots[i] for i in mine), strict=True):
                slots[i] = slot
    placed = [names[slots.index(place)] for place in range(len(names))]
    # 5. IDs before chunks, and their list after a document's last-placed chunk.
    marked = [name for name in placed if labelled and len(knotted[name[0]]) > 1]
    drawn = rng.randint(62, size=(len(marked), 6)) if labelled else []
    id_of = {
        name: [ord(ID_ALPHABET[c]) for c in characters]
        for name, characters in zip(marked, drawn, strict=True)
    }
    ids, flags = [], []
    for place, name in enumerate(placed):
        chunk = knotted[name[0]][name[1]]
        if name in id_of:
            ids += [OPEN, *id_of[name], CLOSE]
            # Random, so it is not learned.
            flags += [0] * 8
        ids += chunk
        flags += [flag_of.get(token, 0) for token in chunk]
        if name in id_of and all(other[0] != name[0] for other in placed[place + 1 :]):
            order = [c for k in range(len(knotted[name[0]])) for c in id_of[(name[0], k)]]
            ids += [OPEN, *order, CLOSE]
            flags += [0, *[1] * len(order), 0]
    # What follows a special token is not learned either, but for the list of IDs.
    for place in range(1, len(ids)):
        if ids[place - 1] in (HEAD, TAIL, OPEN, CLOSE) and ids[place] >= 1000:
            flags[place] = 0
    # 6. As long as before.
    return ids[: len(whole)], flags[: len(whole)]


@pytest.mark.parametrize("settings", VARIANTS)
def test_against_the_reference(settings: UntieSettings) -> None:
    for row, lengths in enumerate(rows(60)):
        layout = layout_row(settings, row, lengths)
        ids, flags = apply_layout(layout, documents_of(lengths), KNOTTED.knots)
        expected_ids, expected_flags = reference(settings, row, lengths)
        assert ids.tolist() == expected_ids
        assert flags.tolist() == expected_flags
        assert layout.num_targets == sum(expected_flags)
        assert ids.dtype == flags.dtype == np.int32


@pytest.mark.parametrize("settings", VARIANTS)
def test_no_token_is_lost_or_doubled_but_at_the_end(settings: UntieSettings) -> None:
    for row, lengths in enumerate(rows(60, seed=1)):
        layout = layout_row(settings, row, lengths)
        documents = documents_of(lengths)
        ids, flags = apply_layout(layout, documents, KNOTTED.knots)
        assert len(ids) == len(flags) == sum(lengths)
        kept = Counter(int(i) for i in ids if i >= 1000)
        assert set(kept.values()) <= {1}
        # As many are lost as special tokens and IDs were put in.
        assert len(kept) == sum(lengths) - int((ids < 1000).sum())
        special = np.isin(ids, (HEAD, TAIL, OPEN, CLOSE))
        assert not flags[special].any()
        assert not flags[0]


@pytest.mark.parametrize("settings", VARIANTS)
def test_documents_are_read_back_by_their_knots(
    settings: UntieSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untie, "_truncate", lambda pieces, length: tuple(pieces))
    for row, lengths in enumerate(rows(60, seed=2)):
        layout = layout_row(settings, row, lengths)
        slices = [p for p in layout.pieces if isinstance(p, Slice)]
        assert slices[-1].document == len(lengths) - 1  # the last stays last
        for document, length in enumerate(lengths):
            mine = [p for p in slices if p.document == document]
            in_order = sorted(mine, key=lambda p: p.start)
            assert settings.preserve_order <= (mine == in_order)
            assert [p.start for p in in_order] == [0, *(p.stop for p in in_order[:-1])]
            assert in_order[-1].stop == length
            for piece in mine:
                place = layout.pieces.index(piece)
                before, after = layout.pieces[:place][-1:], layout.pieces[place + 1 :][:1]
                assert (before == (Knot("knot_head"),)) == (piece.start > 0)
                assert (after == (Knot("knot_tail"),)) == (piece.stop < length)


def test_documents_are_read_back_by_their_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(untie, "_truncate", lambda pieces, length: tuple(pieces))
    settings = UntieSettings(
        probability=1.0, chunk_weights=MIXED, backtrace_probability=1.0, fixed_chunk_tokens=8
    )
    lists = 0
    for row, lengths in enumerate(rows(60, seed=3)):
        layout = layout_row(settings, row, lengths)
        chunk_of: dict[tuple[int, ...], Slice] = {}
        for place, piece in enumerate(layout.pieces):
            if not isinstance(piece, Label):
                continue
            around = layout.pieces[place - 1], layout.pieces[place + 1]
            assert around == (Knot("id_open"), Knot("id_close"))
            if not piece.learned:
                assert piece.length == 6
                following = [p for p in layout.pieces[place + 2 :] if isinstance(p, Slice)]
                chunk_of[piece.characters] = following[0]
                continue
            parts = [tuple(piece.characters[i : i + 6]) for i in range(0, piece.length, 6)]
            listed = [chunk_of[id_] for id_ in parts]  # all of them came before
            (document,) = {chunk.document for chunk in listed}
            assert listed == sorted(listed)
            assert sum(chunk.length for chunk in listed) == lengths[document]
            lists += 1
    assert lists > 50


def test_rows_depend_on_seed_and_number_alone() -> None:
    settings = UntieSettings(probability=0.5, cut="random", backtrace_probability=0.5)
    lengths = [100, 30, 400, 7]
    layouts = [layout_row(settings, row, lengths) for row in range(50)]
    np.random.seed(1)
    assert [layout_row(settings, row, lengths) for row in reversed(range(50))] == layouts[::-1]
    assert len(set(map(str, layouts))) > 20
    other = UntieSettings(seed=48, probability=0.5, cut="random", backtrace_probability=0.5)
    assert [layout_row(other, row, lengths) for row in range(50)] != layouts
    # Beyond one word of the generator's seed too.
    far = [layout_row(UntieSettings(seed=10**9, probability=1.0), row, lengths) for row in (1, 2)]
    assert far[0] != far[1]


def test_a_layout_that_never_changes() -> None:
    # Written down when this was made: numpy promises the stream, and resumed runs rely on it.
    settings = UntieSettings(probability=1.0, cut="random", backtrace_probability=1.0)
    layout = layout_row(settings, 3, [40, 9])
    ids, _ = apply_layout(layout, documents_of([40, 9]), KNOTTED.knots)
    text = KNOTTED.decode([i if i < 1000 else ord(".") for i in ids], skip_special_tokens=False)
    assert text == (
        "<|id_open|>FqPVXQ<|id_close|>..<|knot_tail|>"
        "<|id_open|>cctOGP<|id_close|>........<|knot_tail|>"
        "<|id_open|>tTQAO5<|id_close|><|knot_head|>...........<|id_open|>"
    )


def test_probabilities_hold() -> None:
    settings = UntieSettings(
        probability=0.3, chunk_weights=(0.1, 0.5, 0.4), backtrace_probability=0.25
    )
    lengths = [64, 64, 64, 64, 2000]
    touched, with_ids, chunks = 0, 0, Counter[int]()
    count = 4000
    for row in range(count):
        layout = layout_row(settings, row, lengths)
        whole = Layout(tuple(Slice(i, 0, n) for i, n in enumerate(lengths)))
        if layout == whole:
            continue
        touched += 1
        with_ids += any(isinstance(piece, Label) for piece in layout.pieces)
        per_document = Counter(p.document for p in layout.pieces if isinstance(p, Slice))
        chunks.update(per_document[document] for document in range(4))
    # Five standard deviations of each count.
    assert abs(touched - 0.3 * count) < 5 * np.sqrt(0.21 * count)
    assert abs(with_ids - 0.25 * touched) < 5 * np.sqrt(0.1875 * touched)
    for number, weight in ((1, 0.1), (2, 0.5), (3, 0.4)):
        deviation = np.sqrt(weight * (1 - weight) * 4 * touched)
        assert abs(chunks[number] - weight * 4 * touched) < 5 * deviation


def test_weights_whose_sum_rounds() -> None:
    # Drawn as high as a draw can be: in two, since three and four have no weight.
    settings = UntieSettings(probability=1.0, chunk_weights=(0.3, 0.7 - 1e-7, 0.0, 0.0))
    found = layout_row(settings, 0, [64]).pieces
    assert len([p for p in found if isinstance(p, Slice)]) in (1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untie, "_generator", Highest)
        found = layout_row(settings, 0, [64] * 3).pieces
    assert {p[1:] for p in found[:-1] if isinstance(p, Slice)} == {(0, 32), (32, 64)}


class Highest(np.random.RandomState):
    """Draws the highest number below 1, but for whether a row is touched."""

    def random_sample(self, size: Any = None) -> Any:
        return 0.0 if size is None else np.full(size, 1 - 2**-53)


def test_documents_stay_as_they_are() -> None:
    documents = documents_of([20, 20])
    settings = UntieSettings(probability=1.0, backtrace_probability=1.0)
    for row in range(9):
        apply_layout(layout_row(settings, row, [20, 20]), documents, KNOTTED.knots)
    for found, made in zip(documents, documents_of([20, 20]), strict=True):
        assert np.array_equal(found, made)


def test_cuts() -> None:
    even = UntieSettings(probability=1.0)
    layout = layout_row(even, 0, [11, 4000])
    assert {p[1:] for p in layout.pieces if isinstance(p, Slice) and p.document == 0} == {
        (0, 3), (3, 6), (6, 11)
    }  # fmt: skip
    fixed = UntieSettings(probability=1.0, chunk_weights=(0, 0, 0, 1.0))
    layout = layout_row(fixed, 0, [2100, 4000])
    assert {p[1:] for p in layout.pieces if isinstance(p, Slice) and p.document == 0} == {
        (0, 1024), (1024, 2048), (2048, 2100)
    }  # fmt: skip
    # Random cuts reach every place, and none of them twice.
    random = UntieSettings(probability=1.0, cut="random")
    starts: set[int] = set()
    for row in range(300):
        pieces = layout_row(random, row, [11, 4000]).pieces
        found = sorted(p.start for p in pieces if isinstance(p, Slice) and p.document == 0)
        assert len(set(found)) == 3
        starts.update(found)
    assert starts == set(range(11))
    # What is too short stays whole; nothing at all is nothing.
    assert len([p for p in layout_row(even, 0, [2, 2]).pieces if isinstance(p, Slice)]) == 2
    assert layout_row(even, 0, []) == Layout(())
    assert [len(a) for a in apply_layout(Layout(()), [], KNOTTED.knots)] == [0, 0]


def test_knots_of_the_byte_tokenizer() -> None:
    plain = byte_tokenizer()
    assert KNOTTED.vocab_size == 267
    assert [KNOTTED.knots.special(role) for role in KNOT_TOKENS] == [HEAD, TAIL, OPEN, CLOSE]
    assert KNOTTED.knots.characters == tuple(ord(c) for c in ID_ALPHABET)
    assert KNOTTED.special_ids == plain.special_ids
    for text in [*TEXTS, *KNOT_TOKENS.values()]:
        assert KNOTTED.encode(text) == plain.encode(text) == list(text.encode())
    with pytest.raises(DataError, match=r"has no <\|knot_head\|>"):
        _ = plain.knots
    again = Tokenizer.from_json(KNOTTED.to_json())
    assert again.knots == KNOTTED.knots
    assert again.with_knots().to_json() == KNOTTED.to_json()


def test_knots_of_another_tokenizer() -> None:
    plain = Tokenizer(foreign())
    knotted = plain.with_knots()
    assert [knotted.knots.special(role) for role in KNOT_TOKENS] == list(
        range(plain.vocab_size, plain.vocab_size + 4)
    )
    assert knotted.decode(list(knotted.knots.characters)) == ID_ALPHABET
    ours = {knotted.knots.special(role) for role in KNOT_TOKENS}
    for text in [*TEXTS, *KNOT_TOKENS.values(), "the cat sat on the mat"]:
        assert knotted.encode(text) == plain.encode(text)
        assert ours.isdisjoint(knotted.encode(text))
    assert plain.vocab_size == Tokenizer(foreign()).vocab_size


def test_tokenizers_that_cannot_have_knots() -> None:
    some = models.BPE({c: i for i, c in enumerate(ID_ALPHABET.replace("7", ""))}, [])
    with pytest.raises(DataError, match="no token for '7' alone"):
        Tokenizer(tokenizers.Tokenizer(some)).with_knots()
    other = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(ID_ALPHABET)}, []))
    other.decoder = decoders.Replace("Q", "q")
    with pytest.raises(DataError, match="no token for 'Q' alone"):
        Tokenizer(other).with_knots()
    gaps = models.BPE({**{c: i for i, c in enumerate(ID_ALPHABET)}, "9": 500}, [])
    with pytest.raises(DataError, match="gaps of its vocabulary"):
        Tokenizer(tokenizers.Tokenizer(gaps)).with_knots()


def test_knots_that_the_vocabulary_itself_spells() -> None:
    # With ignore_merges a whole word of the vocabulary is taken as it is, special or not.
    characters = sorted(set("".join([ID_ALPHABET, *KNOT_TOKENS.values()])))
    vocabulary = {c: i for i, c in enumerate([*characters, "<|knot_tail|>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    backend.add_special_tokens(list(KNOT_TOKENS.values()))
    tokenizer = Tokenizer(backend)
    assert tokenizer.knots.knot_tail == vocabulary["<|knot_tail|>"]
    assert tokenizer.encode("<|knot_tail|>") == [vocabulary[c] for c in "<|knot_tail|>"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"probability": 1.5},
        {"backtrace_probability": -0.1},
        {"probability": float("nan")},
        {"chunk_weights": ()},
        {"chunk_weights": (0.5, 0.4)},
        {"chunk_weights": (1.5, -0.5)},
        {"cut": "odd"},
        {"fixed_chunk_tokens": 0},
        {"seed": -1},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        UntieSettings(**wrong)
