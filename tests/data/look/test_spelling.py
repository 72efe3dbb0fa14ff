"""The text of single tokens, against whole texts and the bytes they are made of."""

from __future__ import annotations

import random
import unicodedata

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_vlm.data.look.characters import visible
from megatron_vlm.data.look.spelling import spell
from megatron_vlm.data.tokenizer import Tokenizer, byte_tokenizer

pytestmark = pytest.mark.unit

TEXTS = [
    "plain words, and more of them",
    "naïve café \u4e2d\u6587 \u0632\u0645\u0627\u0646 \U0001f469\u200d\U0001f467 end",
    "  two  spaces\n\nlines\ttab ",
    "\U0001f600" * 9,
    "",
]


def byte_pairs() -> Tokenizer:
    """A byte-level BPE whose merges join parts of characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return Tokenizer(backend)


def word_pieces() -> Tokenizer:
    """A vocabulary whose decoder drops the space before the first word, and falls back to bytes."""
    words = ["\u2581plain", "\u2581words", ",", "\u2581and", "\u2581more", "\u2581of", "\u2581them"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "\u2581", *words])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("make", [byte_tokenizer, byte_pairs, word_pieces])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_make_up_the_text(make: object, text: str) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    ids = tokenizer.encode(text)
    spelled = spell(tokenizer, ids)
    assert sum(found.tokens for found in spelled) == len(ids)
    assert "".join(found.text for found in spelled) == tokenizer.decode(ids)
    assert not any(found.special or "\ufffd" in found.text for found in spelled)


def test_each_character_of_the_byte_tokenizer_is_one_group() -> None:
    text = TEXTS[1]
    found = [(s.tokens, s.text) for s in spell(byte_tokenizer(), list(text.encode()))]
    assert found == [(len(c.encode()), c) for c in text]


def test_words_keep_their_spaces() -> None:
    tokenizer = word_pieces()
    ids = tokenizer.encode("plain words and more")
    texts = [found.text for found in spell(tokenizer, ids)]
    assert texts == ["plain", " words", " and", " more"]
    # A bound between two tokens changes nothing of their text.
    assert [found.text for found in spell(tokenizer, ids, {1, 2})] == texts


def test_special_tokens_are_told_from_text_that_spells_them() -> None:
    tokenizer = byte_tokenizer()
    ids = [260, *tokenizer.encode("<|user|>"), 262]
    found = spell(tokenizer, ids)
    assert (found[0].text, found[0].special) == ("<|user|>", True)
    assert (found[-1].text, found[-1].special) == ("<|end|>", True)
    assert "".join(s.text for s in found[1:-1]) == "<|user|>"
    assert not any(s.special for s in found[1:-1])


def test_no_group_goes_across_a_bound() -> None:
    ids = list("a\u00e9\U0001f600b".encode())
    for bound in range(1, len(ids)):
        at, starts = 0, set()
        for found in spell(byte_tokenizer(), ids, {bound}):
            starts.add(at)
            at += found.tokens
        assert at == len(ids) and bound in starts


def test_any_ids_are_spelled() -> None:
    rng = random.Random(3)
    for make in (byte_tokenizer, byte_pairs, word_pieces):
        tokenizer = make()
        for _ in range(30):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(40)]
            assert sum(found.tokens for found in spell(tokenizer, ids)) == 40


def test_what_cannot_be_seen_is_named() -> None:
    assert visible("a\u202eb\x00\x1b[31m\x7f\n") == "a[U+202E]b[U+0000][U+001B][31m[U+007F][U+000A]"
    assert visible("a\n\tb", "\n") == "a\n[U+0009]b"
    assert visible("\ud800") == "[U+D800]"
    assert visible("caf\u00e9 \u4e2d\u6587 \u0632") == "caf\u00e9 \u4e2d\u6587 \u0632"
    # The first planes of Unicode: what is left has a shape, and nothing with one is taken away.
    shown = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    for code in range(0x20000):
        character = chr(code)
        if unicodedata.category(character) in shown:
            assert visible(character) == f"[U+{code:04X}]"
        else:
            assert visible(character) == character
