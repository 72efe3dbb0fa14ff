"""Tokenizers and the chat format: what text can and cannot produce, and what is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megatron_vlm.data.chat import Turn, encode_conversation, encode_prompt
from megatron_vlm.data.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_tokenizer
from megatron_vlm.errors import DataError

pytestmark = pytest.mark.unit

PAD, EOS, IMAGE, SYSTEM, USER, ASSISTANT, END = range(256, 263)
TEXTS = ["", "plain", "naïve 語 😀", "\x00\t\r\n  two  spaces", "<image>", *SPECIAL_TOKENS.values()]


def foreign() -> tokenizers.Tokenizer:
    """A trained BPE that knows one of our spellings as an ordinary token, and cuts and pads."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<|eos|>"],
    )
    backend.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    backend.add_tokens(["<|user|>", "<tool>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_byte_tokenizer_is_utf8(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_tokenizer_special_ids() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 263
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_id) == (PAD, EOS, IMAGE)
    assert tokenizer.special("assistant") == tokenizer.special("<|assistant|>") == ASSISTANT
    assert tokenizer.decode([72, USER, 105]) == "Hi"
    assert tokenizer.decode([72, USER, 105], skip_special_tokens=False) == "H<|user|>i"


def test_foreign_tokenizer_gains_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(foreign().to_str())
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    ids = set(tokenizer.special_ids.by_token().values())
    assert len(ids) == 7
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.eos_id == 1  # its own is kept
    for text in TEXTS:
        assert ids.isdisjoint(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 0 not in tokenizer.encode("<unk>")  # nor can its own special tokens be spelled
    long = "the cat sat on the mat " * 20
    assert tokenizer.decode(tokenizer.encode(long)) == long  # neither cut nor padded
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.special_ids == tokenizer.special_ids
    assert again.encode("a <|user|> b") == tokenizer.encode("a <|user|> b")


def test_spelling_that_the_vocabulary_itself_holds() -> None:
    # With ignore_merges a whole word of the vocabulary is taken as it is, special or not.
    vocabulary = {c: i for i, c in enumerate(sorted(set("".join(SPECIAL_TOKENS.values()))))}
    vocabulary["<|end|>"] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer = Tokenizer(backend)
    assert tokenizer.special("end") == vocabulary["<|end|>"]
    ids = tokenizer.encode("<|end|>")
    assert ids == [vocabulary[c] for c in "<|end|>"]


def test_bad_tokenizers_and_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a Hugging Face"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match="unpaired surrogate at character 1"):
        byte_tokenizer().encode("a\ud800")


def test_conversation_ids_and_flags() -> None:
    turns = [
        Turn("system", "s"),
        Turn("user", "<image>a<image>"),
        Turn("assistant", "b<|end|>"),
        Turn("user", "c"),
        Turn("assistant", "d"),
    ]
    ids, loss = encode_conversation(byte_tokenizer(), turns, 2)
    spelled = list(b"<|end|>")
    assert ids == [
        *[SYSTEM, ord("s"), END],
        *[USER, IMAGE, ord("a"), IMAGE, END],
        *[ASSISTANT, ord("b"), *spelled, END],
        *[USER, ord("c"), END],
        *[ASSISTANT, ord("d"), END, EOS],
    ]
    assert loss == [0] * 3 + [0] * 5 + [0] + [1] * 9 + [0] * 3 + [0, 1, 1, 1]


def test_conversation_that_ends_with_the_user() -> None:
    ids, loss = encode_conversation(byte_tokenizer(), [("assistant", "a"), ("user", "b")], 0)
    assert ids == [ASSISTANT, ord("a"), END, USER, ord("b"), END, EOS]
    assert loss == [0, 1, 1, 0, 0, 0, 0]


def test_pictures_without_marks_open_the_first_user_turn() -> None:
    tokenizer = byte_tokenizer()
    bare = [Turn("system", "s"), Turn("user", "q"), Turn("assistant", "a")]
    marked = [Turn("system", "s"), Turn("user", "<image><image>\nq"), Turn("assistant", "a")]
    assert encode_conversation(tokenizer, bare, 2) == encode_conversation(tokenizer, marked, 2)


def test_prompt_opens_the_conversation() -> None:
    tokenizer = byte_tokenizer()
    prompt = encode_prompt(tokenizer, "<image>\nq", 1)
    assert prompt == [USER, IMAGE, ord("\n"), ord("q"), END, ASSISTANT]
    assert prompt == encode_prompt(tokenizer, "q", 1)
    ids, loss = encode_conversation(tokenizer, [("user", "q"), ("assistant", "yes")], 1)
    assert ids[: len(prompt)] == prompt
    assert loss[: len(prompt)] == [0] * len(prompt)
    assert loss[len(prompt) :] == [1] * 5


@pytest.mark.parametrize(
    ("turns", "pictures", "reason"),
    [
        ([("user", "<image>"), ("assistant", "a")], 2, "1 <image> marks but 2 pictures"),
        ([("user", "<image>"), ("assistant", "a")], 0, "1 <image> marks but 0 pictures"),
        ([("user", "q")], 0, "no assistant turn"),
        ([("robot", "q"), ("assistant", "a")], 0, "role 'robot'"),
        ([], 0, "no assistant turn"),
    ],
)
def test_conversations_that_cannot_be(
    turns: list[tuple[str, str]], pictures: int, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        encode_conversation(byte_tokenizer(), turns, pictures)  # type: ignore[arg-type]
