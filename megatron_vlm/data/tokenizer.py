"""Text to token ids and back, with seven special tokens that no text can produce.

Any Hugging Face `tokenizer.json` serves; without one, a byte-level vocabulary of 256 bytes and the
special tokens is made here.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from megatron_vlm.errors import DataError

SPECIAL_TOKENS: dict[str, str] = {
    "pad": "<|pad|>",
    "eos": "<|eos|>",
    "image": "<|image|>",
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "end": "<|end|>",
}
"""Special tokens by their role."""

KNOT_TOKENS: dict[str, str] = {
    "knot_head": "<|knot_head|>",
    "knot_tail": "<|knot_tail|>",
    "id_open": "<|id_open|>",
    "id_close": "<|id_close|>",
}
"""Special tokens of rows that are untied (`untie`), by their role. A tokenizer has them when it is
asked to, after all other ids."""

ID_ALPHABET = string.ascii_letters + string.digits
"""Characters of the IDs in such rows. Published code: letters and digits."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the special tokens, by role."""

    pad: int
    eos: int
    image: int
    system: int
    user: int
    assistant: int
    end: int

    @classmethod
    def from_names(cls, ids: Mapping[str, int]) -> SpecialIds:
        """From a mapping of token to id, as `dataset.json` holds it.

        Raises:
            KeyError: a token is missing.
        """
        return cls(**{role: int(ids[token]) for role, token in SPECIAL_TOKENS.items()})

    def by_token(self) -> dict[str, int]:
        """Mapping of token to id."""
        return {SPECIAL_TOKENS[role]: value for role, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class KnotIds:
    """Ids of what untied rows are made with."""

    knot_head: int
    knot_tail: int
    id_open: int
    id_close: int
    characters: tuple[int, ...]
    """Id of each character of `ID_ALPHABET`: an ID has as many tokens as characters."""

    def special(self, role: str) -> int:
        """Id of a special token, by its role in `KNOT_TOKENS`."""
        return {role: int(getattr(self, role)) for role in KNOT_TOKENS}[role]


class Tokenizer:
    """A Hugging Face tokenizer whose special tokens are out of reach of the text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Take over `backend`: add the special tokens it lacks, stop it from adding or cutting.

        Args:
            backend: changed in place.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in _all_tokens()]
        )
        # Text that spells a special token is encoded as the characters it is made of.
        backend.encode_special_tokens = True
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.special_ids = SpecialIds.from_names(vocabulary)
        # Asked for once a turn.
        self._special = {**asdict(self.special_ids), **self.special_ids.by_token()}
        added = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        # Never added here, for ids of tokenizers already in use must not change.
        self._has_knots = {t.content for t in added.values()}.issuperset(KNOT_TOKENS.values())
        tokens = [*_all_tokens(), *(KNOT_TOKENS.values() if self._has_knots else ())]
        self._reserved = frozenset(vocabulary[token] for token in tokens)
        self._split_spellings = _split_spellings(tokens)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Ids run from 0 to below this."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Raises:
            DataError: the file is missing or is no Hugging Face tokenizer.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"tokenizer {path}: cannot be read ({error.strerror}); expected a tokenizer.json"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"tokenizer {path}: not UTF-8 text; expected a tokenizer.json"
            ) from error
        return cls.from_json(text, name=str(path))

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer.json") -> Tokenizer:
        """From the text of a `tokenizer.json`; `name` is what errors call it.

        Raises:
            DataError: the text is no Hugging Face tokenizer.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception for every fault
            raise DataError(
                f"tokenizer {name}: not a Hugging Face tokenizer.json ({error})"
            ) from error
        return cls(backend)

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.special_ids.pad

    @property
    def eos_id(self) -> int:
        """Id that ends a sample."""
        return self.special_ids.eos

    @property
    def image_id(self) -> int:
        """Id of a picture's placeholder, and of each language token it grows into."""
        return self.special_ids.image

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of all tokens that were added to the vocabulary, the special ones above all."""
        return self._added

    def special(self, name: str) -> int:
        """Id of a special token, by its role (`user`) or its spelling (`<|user|>`).

        Raises:
            KeyError: no such special token.
        """
        return self._special[name]

    def spelling(self, token: int) -> str:
        """How the vocabulary spells a token; a special one as texts of templates do.

        Raises:
            KeyError: no such token.
        """
        spelled = self._backend.id_to_token(token)
        if spelled is None:
            raise KeyError(token)
        return str(spelled)

    def with_knots(self) -> Tokenizer:
        """This tokenizer with the special tokens of `KNOT_TOKENS`, after all its ids.

        Raises:
            DataError: a character of the IDs has no token of its own, or the vocabulary has gaps
                that the new tokens fall into.
        """
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in KNOT_TOKENS.values()]
        )
        extended = Tokenizer(backend)
        knots = extended.knots
        if not self._has_knots and min(map(knots.special, KNOT_TOKENS)) < self.vocab_size:
            raise DataError(
                f"tokenizer: {', '.join(KNOT_TOKENS.values())} would fall into gaps of its "
                "vocabulary; use one whose ids have none"
            )
        return extended

    @cached_property
    def knots(self) -> KnotIds:
        """Ids of what untied rows are made with.

        Raises:
            DataError: this tokenizer lacks them, or a character of the IDs has no token of its own.
        """
        if not self._has_knots:
            raise DataError(
                f"tokenizer: has no {KNOT_TOKENS['knot_head']}, which untied rows need; build the "
                "data set with a tokenizer that has the knots"
            )
        characters = []
        for character in ID_ALPHABET:
            token = self._backend.token_to_id(character)
            if token is None or self._backend.decode([token]) != character:
                raise DataError(
                    f"tokenizer: has no token for {character!r} alone, which the IDs of untied "
                    "rows need; use one that knows every letter and digit"
                )
            characters.append(token)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        special = {role: int(vocabulary[token]) for role, token in KNOT_TOKENS.items()}
        return KnotIds(**special, characters=tuple(characters))

    def encode(self, text: str) -> list[int]:
        """Ids of a text. None of them is special, whatever the text spells.

        Raises:
            DataError: the text is not valid Unicode, or this tokenizer cannot keep it apart from
                its special tokens.
        """
        ids = self._encode(text)
        if self._reserved.isdisjoint(ids):
            return ids
        # Some vocabularies hold the special spellings as ordinary entries; broken after its
        # first character, a spelling matches none.
        ids = [i for piece in self._split_spellings.split(text) for i in self._encode(piece)]
        if self._reserved.isdisjoint(ids):
            return ids
        raise DataError(
            f"text {text[:60]!r} turns into special tokens; use a tokenizer whose vocabulary "
            f"does not produce {', '.join(_all_tokens())} from text"
        )

    def encode_template(self, text: str) -> list[int]:
        """Ids of a template's own text, in which spellings of added tokens are those tokens.

        Never for text of a data set: see `encode`.

        Raises:
            DataError: the text is not valid Unicode.
        """
        return [token for _, token in self._parse(text)]

    def split_template(self, text: str) -> list[str | int]:
        """A template's own text as runs of ordinary text and, between them, ids of added tokens.

        Raises:
            DataError: the text is not valid Unicode.
        """
        pieces: list[str | int] = []
        end = 0
        for (start, stop), token in self._parse(text):
            if token not in self._added:
                continue
            if start > end:
                pieces.append(text[end:start])
            pieces.append(token)
            end = stop
        return [*pieces, text[end:]] if end < len(text) else pieces

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; special tokens are left out, or spelled when asked for."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def to_json(self) -> str:
        """The text of a `tokenizer.json` that holds the special tokens too."""
        return str(self._backend.to_str())

    @cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        """A second one, which takes spellings for what they spell. Switching the first one back and
        forth would be seen by other threads."""
        return tokenizers.Tokenizer.from_str(self.to_json())

    def _parse(self, text: str) -> list[tuple[tuple[int, int], int]]:
        _check_unicode(text)
        encoding = self._parser.encode(text, add_special_tokens=False)
        return list(zip(encoding.offsets, encoding.ids, strict=True))

    def _encode(self, text: str) -> list[int]:
        _check_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def byte_tokenizer() -> Tokenizer:
    """The default tokenizer: id b is byte b, ids 256 to 262 the special tokens in order."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256, which names a tokenizer."""
    return hashlib.sha256(content).hexdigest()


def _all_tokens() -> list[str]:
    return list(SPECIAL_TOKENS.values())


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"text has an unpaired surrogate at character {error.start}; remove it"
        ) from error


def _split_spellings(tokens: Sequence[str]) -> re.Pattern[str]:
    """Splits between the first and the second character of every token's spelling."""
    return re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in tokens))


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte, by byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols
