"""Plain text and Megatron's token files: documents, all of them learned."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_vlm.data.draft import Text
from megatron_vlm.data.sources import megatron_tokens, plain_text
from megatron_vlm.data.sources.megatron_tokens import open_megatron_tokens
from megatron_vlm.data.sources.options import SourceOptions
from megatron_vlm.data.sources.plain_text import open_text, open_text_lines
from megatron_vlm.data.tokenizer import byte_tokenizer
from megatron_vlm.errors import DataError
from tests.data.sources.reading import EOS, assert_resumes, only, parts_of, reasons, write_lines

pytestmark = pytest.mark.unit

TOKENIZER = byte_tokenizer()
WITH_TOKENIZER = SourceOptions(tokenizer=TOKENIZER)
EOS_ID, IMAGE_ID = TOKENIZER.eos_id, TOKENIZER.image_id


def document(text: str) -> list[Any]:
    return [Text(text, True), EOS]


def test_a_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.txt").write_text("<|eos|> <image> ü")
    (tmp_path / "d.txt").write_bytes(b"ab\xff")
    (tmp_path / "e.txt").write_bytes(b" \n")
    source = open_text(tmp_path, SourceOptions())
    listing = assert_resumes(source)
    assert source.kind == "document" and source.total == 4
    assert [item[2] for item in listing] == ["a/c.txt", "b.txt", "d.txt", "e.txt"]
    assert [item[1] for item in listing] == [0, 1, 2, 3]
    assert listing[0][3] == [(document("<|eos|> <image> ü"), [], {"file": "a/c.txt"})]
    assert listing[1][3] == [(document("one\r\n\r\ntwo \n"), [], {"file": "b.txt"})]
    assert listing[2][3] == "d.txt: not UTF-8 at byte 2; write it again as UTF-8"
    assert listing[3][3] == "e.txt: holds no text, so there is nothing to learn"


def test_lines_and_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\r\nb\n\n\xff\n\nc")
    by_line = assert_resumes(open_text(path, SourceOptions(text_unit="line")))
    assert [item[3] for item in by_line] == [
        [(document("a"), [], {"line": 1})],
        [(document("b"), [], {"line": 2})],
        "x.txt line 4: not UTF-8 at byte 6; write it again as UTF-8",
        [(document("c"), [], {"line": 6})],
    ]
    by_paragraph = assert_resumes(open_text(path, SourceOptions(text_unit="paragraph")))
    assert [item[3] for item in by_paragraph][::2] == [
        [(document("a\r\nb"), [], {"line": 1})],
        [(document("c"), [], {"line": 6})],
    ]


def test_long_text_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "MAX_LINE_BYTES", 10)
    (tmp_path / "x.txt").write_text("a" * 11)
    assert "11 bytes of text" in reasons(open_text(tmp_path, SourceOptions()))[0]


def test_text_that_is_gone_is_one_bad_entry(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    source = open_text(tmp_path, SourceOptions())
    (tmp_path / "a.txt").unlink()
    found = reasons(source)
    assert "a.txt: cannot be read" in found[0] and found[1] == ""


def test_json_lines_of_text(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "x.jsonl",
        [{"body": "a\nb", "url": "u"}, {"text": "c"}, {"body": 3}, {"body": ""}],
    )
    source = open_text_lines(path, SourceOptions(text_field="body"))
    listing = assert_resumes(source)
    assert source.kind == "document"
    assert listing[0][3] == [(document("a\nb"), [], {"url": "u"})]
    assert [item[3] for item in listing[1:]] == [
        "x.jsonl line 2: body: is missing; expected a string",
        "x.jsonl line 3: body: is int; expected a string",
        "x.jsonl line 4: holds no text, so there is nothing to learn",
    ]


def write_tokens(
    prefix: Path, documents: list[list[list[int]]], dtype: Any = np.uint16
) -> list[list[int]]:
    """Write documents of sequences with Megatron's own builder; returns their ids."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return [[i for sequence in sequences for i in sequence] for sequences in documents]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_documents_are_those_of_megatron(tmp_path: Path, dtype: Any) -> None:
    rng = random.Random(3)
    limit = 200 if dtype == np.uint8 else EOS_ID
    documents = [
        [
            [rng.randrange(limit) for _ in range(rng.randint(1, 30))]
            for _ in range(rng.randint(1, 4))
        ]
        for _ in range(20)
    ]
    flat = write_tokens(tmp_path / "t.v2", documents, dtype)
    source = open_megatron_tokens(tmp_path / "t.v2", WITH_TOKENIZER)
    listing = assert_resumes(source)
    assert source.total == 20
    assert [item[3] for item in listing] == [
        [([("tokens", ids, True), EOS], [], {"document": i})] for i, ids in enumerate(flat)
    ]
    # Megatron's own reader, sequence by sequence.
    megatron = IndexedDataset(str(tmp_path / "t.v2"))
    bounds = megatron.document_indices
    assert [
        np.concatenate([megatron[s] for s in range(bounds[i], bounds[i + 1])]).tolist()
        for i in range(20)
    ] == flat
    for given in (tmp_path / "t.v2.idx", tmp_path / "t.v2.bin", tmp_path):
        assert len(list(open_megatron_tokens(given, WITH_TOKENIZER).entries())) == 20


def test_ends_of_documents(tmp_path: Path) -> None:
    write_tokens(
        tmp_path / "t",
        [[[1, 2, EOS_ID]], [[3, EOS_ID, 4]], [[5, 99]], [[99]], [[EOS_ID]], [[]], [[6], [], [99]]],
    )
    source = open_megatron_tokens(
        tmp_path / "t", SourceOptions(tokenizer=TOKENIZER, end_of_document=99)
    )
    parts = [
        item[3] if isinstance(item[3], str) else item[3][0][0] for item in assert_resumes(source)
    ]
    assert parts == [
        [("tokens", [1, 2, EOS_ID], True)],
        [("tokens", [3, EOS_ID, 4], True), EOS],
        [("tokens", [5], True), EOS],
        "t.idx document 3: the document is empty, so there is nothing to learn",
        "t.idx document 4: the document is empty, so there is nothing to learn",
        "t.idx document 5: the document is empty, so there is nothing to learn",
        [("tokens", [6], True), EOS],
    ]


def test_ids_outside_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = TOKENIZER.vocab_size
    write_tokens(tmp_path / "t", [[[1, size]], [[-1]], [[5, IMAGE_ID]], [[size - 1]]], np.int32)
    source = open_megatron_tokens(tmp_path / "t", WITH_TOKENIZER)
    found = reasons(source)
    assert f"token 1 has id {size}; the vocabulary ends at {size - 1}" in found[0]
    assert "token 0 has id -1" in found[1]
    assert "token 1 stands for a picture" in found[2]
    assert found[3] == ""
    monkeypatch.setattr(megatron_tokens, "MAX_DOCUMENT_TOKENS", 1)
    assert "2 tokens; at most 1" in reasons(source)[0]
    with pytest.raises(DataError, match="set --tokenizer"):
        open_megatron_tokens(tmp_path / "t", SourceOptions())


def damaged(content: bytes, at: int, form: str, value: int) -> bytes:
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"NOTMMIDX!" + c[9:], "does not begin with MMIDIDX"),
        (lambda c: c[:20], "does not begin with MMIDIDX"),
        (lambda c: damaged(c, 9, "<Q", 2), "version 2; expected 1"),
        (lambda c: damaged(c, 17, "<B", 6), "type code 6"),
        (lambda c: damaged(c, 17, "<B", 99), "type code 99"),
        (lambda c: damaged(c, 18, "<Q", 2**60), "was cut off or is damaged"),
        (lambda c: c[:-1], "was cut off or is damaged"),
        (lambda c: c + b"\1\0", "holds sequences that are no text"),
        (lambda c: damaged(c, 34, "<i", -1), "sequence 0 .* lies outside t.bin"),
        (lambda c: damaged(c, 38, "<i", 10**6), "sequence 1 .* lies outside t.bin"),
        (lambda c: damaged(c, 42, "<q", -2), "sequence 0 .* lies outside"),
        (lambda c: damaged(c, 50, "<q", 2**63 - 1), "sequence 1 .* lies outside"),
        (lambda c: damaged(c, 58, "<q", 1), "boundaries do not run from 0 to 2"),
        (lambda c: damaged(c, 66, "<q", 3), "boundaries do not run from 0 to 2"),
        (lambda c: damaged(c, 74, "<q", 1), "boundaries do not run from 0 to 2"),
    ],
)
def test_damaged_index_stops_at_once(tmp_path: Path, change: Any, message: str) -> None:
    write_tokens(tmp_path / "t", [[[1, 2]], [[3]]])
    path = tmp_path / "t.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"t.idx: .*{message}"):
        open_megatron_tokens(tmp_path / "t", WITH_TOKENIZER)


def test_modality_bytes_of_text_are_taken(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[[1, 2]], [[3]]])
    path = tmp_path / "t.idx"
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert reasons(open_megatron_tokens(path, WITH_TOKENIZER)) == ["", ""]


def test_a_half_of_a_pair_is_told(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[[1, 2]]])
    source = open_megatron_tokens(tmp_path / "t", WITH_TOKENIZER)
    (tmp_path / "t.bin").write_bytes(b"12")
    assert "t.bin: became shorter" in reasons(source)[0]
    (tmp_path / "t.bin").unlink()
    with pytest.raises(DataError, match="t.bin: cannot be read.*belong together"):
        open_megatron_tokens(tmp_path / "t", WITH_TOKENIZER)
    with pytest.raises(DataError, match="other.idx: does not exist"):
        open_megatron_tokens(tmp_path / "other", WITH_TOKENIZER)


def test_mutated_indexes_never_crash(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t", [[[1, 2], [3]], [[4, 5, 6]], [[7]]])
    path = tmp_path / "t.idx"
    whole = path.read_bytes()
    rng = random.Random(8)
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(9, len(content))] = rng.choice([0, 1, 0x7F, 0xFF])
        path.write_bytes(content)
        try:
            source = open_megatron_tokens(path, WITH_TOKENIZER)
        except DataError as error:
            assert "t.idx" in str(error) or "t.bin" in str(error)
            continue
        for entry in source.entries():
            try:
                assert sum(len(part[1]) for part in parts_of(entry.drafts()[0])[:1]) <= 7
            except DataError as error:
                assert "document" in str(error)


def test_one_text_file_by_any_name(tmp_path: Path) -> None:
    path = tmp_path / "README"
    path.write_text("x")
    draft = only(open_text(path, SourceOptions()))
    assert (parts_of(draft), json.loads(draft.entry)) == (document("x"), {"file": "README"})
